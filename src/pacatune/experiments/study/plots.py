"""Two plots of a study: what the arms reach, and how that depends on the learning rate."""

from pathlib import Path

from pacatune.experiments.study.result import StudyResult
from pacatune.reports.figures import new_figure, save_figure


def draw_metric(result: StudyResult, path: Path) -> None:
    """Draw each arm's seeds as points and its mean as a line."""
    names = list(result.arms)
    figure = new_figure(max(5.0, 1.5 + 1.1 * len(names)), 4)
    axes = figure.add_subplot()
    for place, arm in enumerate(result.arms.values()):
        for number, value in enumerate(arm.values.values()):
            # Side by side, so that equal values can be seen; the same place for the same seed.
            shift = 0.4 * ((number + 0.5) / len(arm.values) - 0.5)
            axes.plot(place + shift, value, "o", color="C0", alpha=0.7, markersize=4)
        if arm.mean is not None:
            axes.plot([place - 0.3, place + 0.3], [arm.mean] * 2, color="black", linewidth=1.5)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set(ylabel=f"test {result.metric}", title="a point for each seed; line: mean of the seeds")
    axes.grid(axis="y", alpha=0.3)
    save_figure(figure, path)


def draw_rates(result: StudyResult, path: Path) -> None:
    """Draw each arm's metric on validation data over the learning rate; the best is marked."""
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    for number, arm in enumerate(result.arms.values()):
        found = {rate: mean for rate, mean in arm.rates.items() if mean is not None}
        color = f"C{number % 10}"
        axes.plot(list(found), list(found.values()), "o-", color=color, label=arm.name, alpha=0.8)
        if arm.learning_rate in found:
            best = found[arm.learning_rate]
            axes.plot(arm.learning_rate, best, "*", color=color, markersize=14)
    axes.set(
        xscale="log",
        xlabel="learning rate",
        ylabel=f"validation {result.metric}",
        title="star: the rate that was taken",
    )
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    save_figure(figure, path)
