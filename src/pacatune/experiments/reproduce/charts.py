"""Pictures of a section, as SVG texts that need nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

from pacatune.experiments.reproduce.section import Measured
from pacatune.reports.figures import new_figure, svg_text

__all__ = ["bars", "lines", "stacked"]

_PAPER, _OURS = "#9a9a9a", "#2b6cb0"


def _panels(num_panels: int, height: float = 3.0) -> tuple[Any, list[Any]]:
    figure = new_figure(4.6 * num_panels, height)
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])


def bars(
    names: Sequence[str],
    paper: Sequence[float | None],
    ours: Sequence[Measured | None],
    labels: tuple[str, str],
    titles: tuple[str, str],
) -> str:
    """Draw the paper's bars and ours, each on its own scale.

    Args:
        names: Names of the lines.
        paper: Its numbers; None leaves a gap.
        ours: With their intervals.
        labels: Labels of the two axes, with units.
        titles: Titles of the two panels: what the numbers were obtained on.
    """
    figure, panels = _panels(2, height=0.9 + 0.28 * len(names))
    places = list(range(len(names)))[::-1]
    known = [(place, value) for place, value in zip(places, paper, strict=True) if value]
    _bar_panel(panels[0], known, [None] * len(known), _PAPER)
    here = [(place, value) for place, value in zip(places, ours, strict=True) if value]
    errors = [(n.value - n.low, n.high - n.value) for _, n in here]
    _bar_panel(panels[1], [(place, n.value) for place, n in here], errors, _OURS)
    for axes, label, source in zip(panels, labels, titles, strict=True):
        axes.set(xlabel=label, title=source, yticks=places, ylim=(-0.6, len(names) - 0.4))
        axes.set_yticklabels(names, fontsize="small")
    panels[1].set_yticklabels([])
    return svg_text(figure)


def _bar_panel(axes: Any, numbers: Sequence[tuple[int, float]], errors: Any, color: str) -> None:
    for (place, value), error in zip(numbers, errors, strict=True):
        spread = None if error is None else [[error[0]], [error[1]]]
        bar = axes.barh(place, value, xerr=spread, color=color, height=0.62, ecolor="black")
        axes.bar_label(bar, fmt="%.4g", fontsize="small", padding=2)
    axes.margins(x=0.18)
    axes.spines[["top", "right"]].set_visible(False)


def lines(series: Mapping[str, Sequence[tuple[float, Measured]]], labels: tuple[str, str]) -> str:
    """Draw a line per name, with an error bar where a number has an interval.

    Args:
        series: Name -> points.
        labels: Labels of x and y.
    """
    figure, (axes,) = _panels(1, height=3.4)
    for name, points in series.items():
        errors = [[y.value - y.low for _, y in points], [y.high - y.value for _, y in points]]
        xs, ys = [x for x, _ in points], [y.value for _, y in points]
        axes.errorbar(xs, ys, yerr=errors, fmt="o-", capsize=3, label=name)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.legend(fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    return svg_text(figure)


def stacked(parts: Mapping[str, Sequence[float]], names: Sequence[str], label: str) -> str:
    """Draw a stacked bar per line.

    Args:
        parts: Title of a line -> its parts.
        names: Names of the parts.
        label: Label of the axis, with its unit.
    """
    figure, (axes,) = _panels(1, height=1.2 + 0.4 * len(parts))
    places = list(range(len(parts)))[::-1]
    lefts = [0.0] * len(parts)
    for number, name in enumerate(names):
        widths = [values[number] for values in parts.values()]
        axes.barh(places, widths, left=lefts, height=0.62, label=name)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axes.set(xlabel=label, yticks=places)
    axes.set_yticklabels(list(parts))
    if len(names) > 1:
        axes.legend(fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    return svg_text(figure)
