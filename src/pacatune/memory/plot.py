"""Stacked bars of estimates, one for each method."""

from collections.abc import Mapping
from pathlib import Path

from pacatune.memory.estimate import Estimate
from pacatune.memory.tracker import CATEGORIES

__all__ = ["check_plot_path", "save_plot"]

_SUFFIXES = (".png", ".svg", ".pdf")
_GIB = 2**30


def check_plot_path(path: Path) -> None:
    """Refuse a file that could not be written, before anything is computed.

    Raises:
        ValueError: If its ending is not one of a picture.
        FileNotFoundError: If its folder does not exist.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"plot {path}: the file must end in one of {', '.join(_SUFFIXES)}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"plot {path}: the folder {path.parent} does not exist; make it.")


def save_plot(estimates: Mapping[str, Estimate], path: Path, available_bytes: int | None) -> None:
    """Draw what each estimate's peak consists of, its spread, and the device's memory.

    Args:
        estimates: Name of each bar -> its estimate.
        path: Picture to write.
        available_bytes: Drawn as a line, where given.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(1.5 + 1.1 * len(estimates), 4.2), layout="constrained")
    axes = figure.subplots()
    names = list(estimates)
    bottoms = [0.0] * len(names)
    for category in CATEGORIES:
        parts = [e.measured.by_category.get(category, 0) / _GIB for e in estimates.values()]
        if any(parts):
            axes.bar(names, parts, bottom=bottoms, width=0.6, label=category)
        bottoms = [bottom + part for bottom, part in zip(bottoms, parts, strict=True)]
    for position, estimate in enumerate(estimates.values()):
        low, high = estimate.low_bytes / _GIB, estimate.high_bytes / _GIB
        axes.vlines(position, low, high, color="black", linewidth=1.5)
        axes.hlines((low, high), position - 0.1, position + 0.1, color="black", linewidth=1.5)
    if available_bytes is not None:
        axes.axhline(available_bytes / _GIB, color="black", linestyle="--", linewidth=1)
    axes.set_ylabel("GiB at the peak (bar); needed on the device (range)")
    axes.legend(fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150)
