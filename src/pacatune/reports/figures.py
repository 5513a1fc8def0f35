"""Figures of matplotlib, made without pyplot.

pyplot would choose a window system and keep every figure in global state.
"""

from pathlib import Path
from typing import Any


def new_figure(width: float, height: float) -> Any:
    """Return a figure of so many inches, whose layout fits by itself."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure; the ending decides the format, and the folder is made where missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
