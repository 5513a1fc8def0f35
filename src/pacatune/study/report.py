"""The report of a study: a table of its arms, and plots."""

from collections.abc import Collection
from pathlib import Path

from pacatune.files.owned_folder import OwnedFolder
from pacatune.reports.figures import new_figure, plain_text, save_figure
from pacatune.reports.provenance import versions_text
from pacatune.reports.rows import Table, number_text
from pacatune.study.result import ArmResult, StudyResult
from pacatune.study.statistics import Comparison

REPORT_NAME, METRIC_PLOT, RATES_PLOT = "report.md", "metric.png", "rates.png"
OUTPUTS = (REPORT_NAME, METRIC_PLOT, RATES_PLOT)
_MEANING = {
    "accuracy": "the share of all test examples whose class it names, in per cent",
    "exact_match": "the share of all test examples whose answer it gives token by token when it "
    "decodes greedily, in per cent",
    "loss": "its loss on all test data (of a language model: the mean over the learned tokens of "
    "each evaluation batch, averaged over the batches by their size)",
}


def write_report(result: StudyResult, folder: OwnedFolder) -> None:
    """Write report.md, metric.png and rates.png."""
    with folder.staged() as staging:
        _draw_metric(result, staging / METRIC_PLOT)
        _draw_rates(result, staging / RATES_PLOT)
    shown = table(result)
    parts = [
        f"# {Path(result.config['task']).stem or 'study'}: {', '.join(result.arms)}",
        "\n".join(shown.markdown()),
        *shown.notes,
        f"![{result.metric}]({METRIC_PLOT})\n\n![Learning rates]({RATES_PLOT})",
    ]
    failures = [f"{arm.name}, {text}" for arm in result.arms.values() for text in arm.failures]
    for heading, texts in (("Warnings", result.warnings), ("Failed runs", failures)):
        if texts:
            parts.append(f"{heading}:\n\n" + "\n".join(f"- {text}" for text in texts))
    versions = f"Versions: {versions_text(result.versions)}."
    folder.write(REPORT_NAME, "\n\n".join([*parts, versions]) + "\n")


def table(result: StudyResult) -> Table:
    """Return the table of arms, with what a reader must know of it."""
    arms = list(result.arms.values())
    compared = [arm.comparison for arm in arms]
    columns = {
        "arm": [arm.name for arm in arms],
        "method": [arm.method for arm in arms],
        "rank": [str(arm.rank or "-") for arm in arms],
        "trained parameters": [f"{arm.num_trainable_parameters:,}" for arm in arms],
        "rate": [
            f"{arm.learning_rate:g}{'!' * arm.at_edge}" if arm.learning_rate else "-"
            for arm in arms
        ],
        f"test {result.metric}": [_spread(arm, result.metric) for arm in arms],
        "n": [str(len(arm.values)) for arm in arms],
        f"minus {result.reference}": [_spread(one, result.metric, "+") for one in compared],
        "p": ["-" if one is None else f"{one.p_value:.2g}" for one in compared],
        "forgetting": ["-" if arm.forgetting is None else f"{arm.forgetting:+.4f}" for arm in arms],
        "step, ms": [_number(arm.step_ms, "ms") for arm in arms],
        "kept for backward": [_number(arm.saved_activation_bytes, "bytes") for arm in arms],
    }
    shown = {title: cells for title, cells in columns.items() if {*cells} != {"-"}}
    return Table(
        header=list(shown),
        cells=[list(cells) for cells in zip(*shown.values(), strict=True)],
        notes=[_notes(result, shown)],
        num_index=2,
    )


def _spread(found: ArmResult | Comparison | None, metric: str, sign: str = "") -> str:
    """Return a mean and after ± its standard deviation; shares are shown in per cent."""
    if found is None or found.mean is None:
        return "-"
    factor, digits = (1, 4) if metric == "loss" else (100, 2)
    spread = "" if found.std is None else f" ± {factor * found.std:.{digits}f}"
    return f"{factor * found.mean:{sign}.{digits}f}{spread}"


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else number_text(value, unit)


def _chosen_by(result: StudyResult) -> str:
    return "loss" if result.config.get("choose_by") == "loss" else result.metric


def _notes(result: StudyResult, columns: Collection[str]) -> str:
    """Return what a reader must know of the table."""
    config = result.config
    tuning, seeds = config["tuning_seeds"], config["seeds"]
    text = (
        f"Each test {result.metric} is a mean over n runs, one for each seed "
        f"({', '.join(map(str, seeds))}), and after ± their standard deviation. What a run reaches "
        f"is {_MEANING[result.metric]}; {'more' if result.higher_is_better else 'less'} is better. "
        f"The rate of each arm has the best {_chosen_by(result)} of its grid on a held-out share "
        f"of the training data ({config['validation_fraction']:g}), with {tuning} of {len(seeds)} "
        "seeds; `!` marks one at the edge of its grid. Test data chose nothing. "
        "All arms see the same batches in the same order, with the same schedule and precision."
    )
    if compared := [arm.comparison for arm in result.arms.values() if arm.comparison]:
        smallest = max(one.smallest_p_value for one in compared)
        text += (
            f" Minus {result.reference}: the mean over n of the differences by seed, and after ± "
            "their standard deviation; p is that of an exact two-sided sign-flip permutation test, "
            f"which cannot be below {smallest:.2g} with so many seeds, and is not corrected for "
            "the number of arms."
        )
    if "forgetting" in columns:
        text += (
            " Forgetting is the mean over n of the rise of the loss per token on general text that "
            "was not trained on."
        )
    if "step, ms" in columns:
        text += (
            " Time of a step and what is kept for the backward pass (of the first batch) are "
            "medians over runs; the runs do not alternate and other programs may have run beside "
            "them, so `pacatune bench` is what measures time."
        )
    return text


def _draw_metric(result: StudyResult, path: Path) -> None:
    """Draw each arm's seeds as points and its mean as a line."""
    figure = new_figure(max(5.0, 1.5 + 1.1 * len(result.arms)), 4)
    axes = figure.add_subplot()
    for place, arm in enumerate(result.arms.values()):
        for number, value in enumerate(arm.values.values()):
            # Side by side, so that equal values can be seen; the same place for the same seed.
            shift = 0.4 * ((number + 0.5) / len(arm.values) - 0.5)
            axes.plot(place + shift, value, "o", color="C0", alpha=0.7, markersize=4)
        if arm.mean is not None:
            axes.plot([place - 0.3, place + 0.3], [arm.mean] * 2, color="black", linewidth=1.5)
    names = list(map(plain_text, result.arms))
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set(ylabel=f"test {result.metric}", title="a point for each seed; line: mean of the seeds")
    axes.grid(axis="y", alpha=0.3)
    save_figure(figure, path)


def _draw_rates(result: StudyResult, path: Path) -> None:
    """Draw each arm's metric on validation data over the learning rate; the best is marked."""
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    for arm in result.arms.values():
        found = {rate: mean for rate, mean in arm.rates.items() if mean is not None}
        (line,) = axes.plot(list(found), list(found.values()), "o-", label=plain_text(arm.name))
        if arm.learning_rate in found:
            best = found[arm.learning_rate]
            axes.plot(arm.learning_rate, best, "*", color=line.get_color(), markersize=14)
    axes.set(
        xscale="log",
        xlabel="learning rate",
        ylabel=f"validation {_chosen_by(result)}",
        title="star: the rate that was taken",
    )
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    save_figure(figure, path)
