"""Draw which columns an adapter trains."""

from pathlib import Path
from typing import Any

from pacatune.adapters.inspect import AdapterReport

__all__ = ["plot_columns"]

_SUFFIXES = (".png", ".svg", ".pdf")
_INCHES_PER_ROW = 0.18


def plot_columns(report: Any, path: Path) -> None:
    """Draw a row of marks for each adapted module, one for each trained column.

    Args:
        report: What `inspect_adapter` returns, of a PaCA adapter.
        path: File to write; its ending decides the format.

    Raises:
        ValueError: If the adapter has no columns, or the ending is another one.
    """
    rows = []
    if isinstance(report, AdapterReport):
        rows = [(one.name, one.columns) for one in report.modules if one.columns is not None]
    if not rows:
        raise ValueError("there are no columns to draw: only PaCA adapters have them.")
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path} must end in one of {', '.join(_SUFFIXES)}.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows.sort(key=lambda row: _natural(row[0]))
    # Without pyplot: it would choose a window system and keep the figure in global state.
    figure = Figure(figsize=(9, 1.5 + _INCHES_PER_ROW * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.eventplot([columns for _, columns in rows], linelengths=0.8, linewidths=1)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(left=-1)
    axes.set(xlabel="column", title=f"{report.selection}: columns of {len(rows)} modules")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
