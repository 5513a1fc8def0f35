"""Draw the scores by category as FastChat does: a radar plot."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pacatune.evaluation.mt_bench.rating import HIGHEST

__all__ = ["MIN_CATEGORIES", "draw_radar"]

MIN_CATEGORIES = 3


def draw_radar(lines: Sequence[dict[str, Any]], title: str, path: Path) -> bool:
    """Draw a corner for each category with a score; say whether there were enough.

    Args:
        lines: The table of a result, the last line being that of all.
        title: Names model and judge.
        path: PNG to write.
    """
    scored = [line for line in lines[:-1] if line["mean"] is not None]
    if len(scored) < MIN_CATEGORIES:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: it would choose a window system and keep the figure in global state.
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(projection="polar")
    angles = [2 * math.pi * place / len(scored) for place in range(len(scored))]
    for name, style in (("turn_1", "--"), ("turn_2", ":"), ("mean", "-")):
        _draw(axes, angles, [line[name] for line in scored], name, style)
    axes.set_xticks(angles, [line["name"] for line in scored])
    axes.tick_params(axis="x", pad=16)
    axes.set_ylim(0, HIGHEST)
    axes.set_title(title, fontsize="medium")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.1, -0.12), fontsize="small")
    figure.savefig(path, dpi=120)
    return True


def _draw(
    axes: Any, angles: list[float], scores: list[float | None], name: str, style: str
) -> None:
    # A category without a score in one turn leaves a gap.
    values = [math.nan if score is None else score for score in scores]
    label = "both turns" if name == "mean" else name.replace("_", " ")
    closed = [*values, values[0]]
    axes.plot([*angles, angles[0]], closed, style, label=label)
    if name == "mean":
        axes.fill([*angles, angles[0]], closed, alpha=0.15)
