"""The report of a study: a table in Markdown, and plots."""

from pathlib import Path

from pacatune.files.owned_folder import OwnedFolder
from pacatune.reports.figures import new_figure, save_figure
from pacatune.reports.provenance import versions_text
from pacatune.reports.tables import ReportTable
from pacatune.study.result import ArmResult, StudyResult

REPORT_NAME, METRIC_PLOT, RATES_PLOT = "report.md", "metric.png", "rates.png"
OUTPUTS = (REPORT_NAME, METRIC_PLOT, RATES_PLOT)


def write_report(result: StudyResult, folder: OwnedFolder) -> None:
    """Write report.md, metric.png and rates.png."""
    with folder.staged() as staging:
        _draw_metric(result, staging / METRIC_PLOT)
        _draw_rates(result, staging / RATES_PLOT)
    folder.write(REPORT_NAME, _to_markdown(result))


def table(result: StudyResult) -> ReportTable:
    """Return the table of arms, with what a reader must know of it."""
    arms = result.arms.values()
    header = ["arm", "method", "rank", "trained parameters", "rate", f"test {result.metric}", "n"]
    header += [f"minus {result.reference}", "p"]
    rows = [_row(arm, result.metric) for arm in arms]
    if any(arm.forgetting is not None for arm in arms):
        header.append("forgetting")
        for row, arm in zip(rows, arms, strict=True):
            row.append("-" if arm.forgetting is None else f"{arm.forgetting:+.4f}")
    if any(arm.step_ms is not None for arm in arms):
        header += ["ms a step", "MB kept"]
        for row, arm in zip(rows, arms, strict=True):
            kept = arm.saved_activation_bytes
            row.append("-" if arm.step_ms is None else f"{arm.step_ms:.0f}")
            row.append("-" if kept is None else f"{kept / 1e6:.1f}")
    title = f"{Path(result.config['task']).stem or 'study'}: {', '.join(result.arms)}"
    return ReportTable(title=title, header=header, rows=rows, note=notes(result))


def _to_markdown(result: StudyResult) -> str:
    shown = table(result)
    parts = [
        f"# {shown.title}",
        "\n".join(shown.lines()),
        shown.note,
        f"![{result.metric}]({METRIC_PLOT})\n\n![Learning rates]({RATES_PLOT})",
    ]
    failures = [f"{arm.name}, {text}" for arm in result.arms.values() for text in arm.failures]
    for heading, texts in (("Warnings", result.warnings), ("Failed runs", failures)):
        if texts:
            parts.append(f"{heading}:\n\n" + "\n".join(f"- {text}" for text in texts))
    return "\n\n".join([*parts, f"Versions: {versions_text(result.versions)}."]) + "\n"


def notes(result: StudyResult) -> str:
    """Return what a reader must know of the table."""
    config = result.config
    tuning, seeds = config["tuning_seeds"], config["seeds"]
    better = "more" if result.higher_is_better else "less"
    compared = [arm.comparison for arm in result.arms.values() if arm.comparison is not None]
    smallest = max((c.smallest_p_value for c in compared), default=None)
    text = (
        f"Each test {result.metric} is a mean over n runs, one for each seed "
        f"({', '.join(map(str, seeds))}), and after ± their standard deviation. What a run reaches "
        f"is {_meaning(result)}; {better} is better. The rate of each arm is the best of its grid "
        f"on a held-out share of the training data ({config['validation_fraction']:g}), with "
        f"{tuning} of {len(seeds)} seeds; `!` marks one at the edge of its grid. Test data chose "
        "nothing. All arms see the same batches in the same order, with the same schedule and "
        "precision."
    )
    if smallest is not None:
        text += (
            f" Minus {result.reference}: the mean over n of the differences by seed, and after ± "
            "their standard deviation; p is that of an exact two-sided sign-flip permutation test, "
            f"which cannot be below {smallest:.2g} with so many seeds, and is not corrected for "
            "the number of arms."
        )
    if any(arm.forgetting is not None for arm in result.arms.values()):
        text += (
            " Forgetting is the mean over n of the rise of the loss per token on general text that "
            "was not trained on."
        )
    if any(arm.step_ms is not None for arm in result.arms.values()):
        text += (
            " Time of a step and megabytes kept for the backward pass (of the first batch) are "
            "medians over runs; the runs do not alternate and other programs may have run beside "
            "them, so `pacatune bench` is what measures time."
        )
    return text


def _meaning(result: StudyResult) -> str:
    """Return what one run's number is a mean of."""
    command = result.config["command"]
    examples = "images" if command == "train-image" else "texts"
    if result.metric == "accuracy":
        return f"the share of all test {examples} whose class it names, in per cent"
    if result.metric == "exact_match":
        return (
            "the share of all test examples whose answer it gives token by token when it decodes "
            "greedily, in per cent"
        )
    if command == "train":
        return (
            "its loss on all test data: the mean over the learned tokens of each evaluation batch, "
            "averaged over the batches by their size"
        )
    return f"its mean loss over all test {examples}"


def _row(arm: ArmResult, metric: str) -> list[str]:
    # Shares are shown in per cent.
    factor, digits = (1, 4) if metric == "loss" else (100, 2)

    def show(mean: float | None, std: float | None, sign: str = "") -> str:
        if mean is None:
            return "-"
        spread = "" if std is None else f" ± {factor * std:.{digits}f}"
        return f"{factor * mean:{sign}.{digits}f}{spread}"

    compared = arm.comparison
    return [
        arm.name,
        arm.method,
        "-" if arm.rank is None else str(arm.rank),
        f"{arm.num_trainable_parameters:,}",
        "-" if arm.learning_rate is None else f"{arm.learning_rate:g}{'!' * arm.at_edge}",
        show(arm.mean, arm.std),
        str(len(arm.values)),
        "" if compared is None else show(compared.mean, compared.std, "+"),
        "" if compared is None else f"{compared.p_value:.2g}",
    ]


def _draw_metric(result: StudyResult, path: Path) -> None:
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


def _draw_rates(result: StudyResult, path: Path) -> None:
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
