"""Pictures of a section, as SVG texts that need nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

from pacatune.experiments.reproduce.experiment import Measured
from pacatune.reports.figures import new_figure, svg_text

_WIDTH = 4.6
_PAPER, _OURS = "#9a9a9a", "#2b6cb0"


def bars(
    names: Sequence[str],
    paper: Sequence[float | None],
    ours: Sequence[Measured],
    labels: tuple[str, str],
    titles: tuple[str, str],
) -> str:
    """Draw the paper's bars (None leaves a gap) and ours, each with label and title of its axes."""
    figure = new_figure(2 * _WIDTH, 0.9 + 0.28 * len(names))
    panels = figure.subplots(1, 2)
    places = list(range(len(names)))[::-1]
    for place, value, here in zip(places, paper, ours, strict=True):
        if value:
            _bar(panels[0], place, value, None, _PAPER)
        error = [[here.value - here.low], [here.high - here.value]]
        _bar(panels[1], place, here.value, error, _OURS)
    for axes, label, source in zip(panels, labels, titles, strict=True):
        axes.set(xlabel=label, title=source, yticks=places, ylim=(-0.6, len(names) - 0.4))
        axes.set_yticklabels(names, fontsize="small")
        axes.margins(x=0.18)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].set_yticklabels([])
    return svg_text(figure)


def _bar(axes: Any, place: int, value: float, error: Any, color: str) -> None:
    bar = axes.barh(place, value, xerr=error, color=color, height=0.62, ecolor="black")
    axes.bar_label(bar, fmt="%.4g", fontsize="small", padding=2)


def lines(series: Mapping[str, Sequence[tuple[float, Measured]]], labels: tuple[str, str]) -> str:
    """Draw a line per name, with an error bar where a number has an interval."""
    figure = new_figure(_WIDTH, 3.4)
    axes = figure.subplots()
    for name, points in series.items():
        errors = [[y.value - y.low for _, y in points], [y.high - y.value for _, y in points]]
        xs, ys = [x for x, _ in points], [y.value for _, y in points]
        axes.errorbar(xs, ys, yerr=errors, fmt="o-", capsize=3, label=name)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.legend(fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    return svg_text(figure)


def stacked(parts: Mapping[str, Sequence[float]], names: Sequence[str], label: str) -> str:
    """Draw a bar for each line, stacked of its named parts."""
    figure = new_figure(_WIDTH, 1.2 + 0.4 * len(parts))
    axes = figure.subplots()
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
