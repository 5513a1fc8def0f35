"""Figures of matplotlib: made without pyplot, written the same every time.

pyplot would choose a window system and keep every figure in global state.
"""

import io
from pathlib import Path
from typing import Any

_SUFFIXES = (".png", ".svg", ".pdf")
_DPI = 120
# The salt makes the names inside, and so the text, the same every time. Words stay words: they can
# be read aloud and searched, and are half as long as their outlines.
_SVG = {"svg.hashsalt": "pacatune", "svg.fonttype": "none"}


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


def svg_text(figure: Any) -> str:
    """Return a figure as an SVG element that needs nothing else."""
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context(_SVG):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def check_picture_path(path: Path) -> None:
    """Refuse a file that is no picture by its name, or is there, before anything is computed."""
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{path} must end in one of {', '.join(_SUFFIXES)}.")
    if path.exists():
        raise FileExistsError(f"{path} exists; remove it, or name another file.")


def plain_text(text: str) -> str:
    """Keep matplotlib from reading a text as mathematics."""
    return text.replace("$", r"\$")
