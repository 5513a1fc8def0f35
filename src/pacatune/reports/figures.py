"""Figures of matplotlib, made without pyplot.

pyplot would choose a window system and keep every figure in global state.
"""

from pathlib import Path
from typing import Any

_SUFFIXES = (".png", ".svg", ".pdf")
_DPI = 120


def new_figure(width: float, height: float) -> Any:
    """Return a figure of so many inches, whose layout fits by itself."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path, dpi: int = _DPI) -> None:
    """Write a figure; the ending decides the format, and the folder is made where missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)


def check_picture_path(path: Path) -> None:
    """Refuse a file that is no picture by its name, or is there, before anything is computed."""
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{path} must end in one of {', '.join(_SUFFIXES)}.")
    if path.exists():
        raise FileExistsError(f"{path} exists; remove it, or name another file.")


def plain_text(text: str) -> str:
    """Keep matplotlib from reading a text as mathematics."""
    return text.replace("$", r"\$")
