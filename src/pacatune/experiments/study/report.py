"""The report of a study: a table in Markdown, and plots."""

from collections.abc import Callable
from pathlib import Path

from pacatune.experiments.study.packaged_tasks import PACKAGED_TASKS
from pacatune.experiments.study.plots import draw_metric, draw_rates
from pacatune.experiments.study.result import ArmResult, StudyResult
from pacatune.reports.provenance import versions_text
from pacatune.reports.tables import table_lines

REPORT_NAME, METRIC_PLOT, RATES_PLOT = "report.md", "metric.png", "rates.png"
OUTPUTS = (REPORT_NAME, METRIC_PLOT, RATES_PLOT)


def write_report(result: StudyResult, folder: Path) -> None:
    """Write report.md, metric.png and rates.png."""
    draw_metric(result, folder / METRIC_PLOT)
    draw_rates(result, folder / RATES_PLOT)
    (folder / REPORT_NAME).write_text(to_markdown(result), encoding="utf-8")


def table(result: StudyResult) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table of arms."""
    head = [
        "arm",
        "method",
        "rank",
        "trained parameters",
        "rate",
        f"test {result.metric}",
        "n",
        f"minus {result.reference}",
        "p",
    ]
    arms = result.arms.values()
    forgets = any(arm.forgetting is not None for arm in arms)
    rows = [_row(arm, result.metric) for arm in arms]
    if forgets:
        head.append("forgetting")
        for row, arm in zip(rows, arms, strict=True):
            row.append("-" if arm.forgetting is None else f"{arm.forgetting:+.4f}")
    return head, rows


def to_markdown(result: StudyResult) -> str:
    """Return the report."""
    head, rows = table(result)
    failures = [
        f"- {arm.name}, {failure}" for arm in result.arms.values() for failure in arm.failures
    ]
    parts = [
        f"# {result.config['task'] or 'study'}: {', '.join(result.arms)}",
        "\n".join(table_lines(head, rows, "llr")),
        notes(result),
        f"![{result.metric}]({METRIC_PLOT})\n\n![Learning rates]({RATES_PLOT})",
    ]
    if result.warnings:
        parts.append("Warnings:\n\n" + "\n".join(f"- {warning}" for warning in result.warnings))
    if failures:
        parts.append("Failed runs:\n\n" + "\n".join(failures))
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
    return text


def _meaning(result: StudyResult) -> str:
    """Return what one run's number is a mean of."""
    task = PACKAGED_TASKS.get(result.config["task"])
    command = result.config["command"] if task is None else task.command
    examples = "images" if command == "train-image" else "texts"
    if result.metric == "accuracy":
        return f"the share of all test {examples} whose class it names, in per cent"
    if command == "train":
        return (
            "its loss on all test data: the mean over the learned tokens of each evaluation batch, "
            "averaged over the batches by their size"
        )
    return f"its mean loss over all test {examples}"


def _row(arm: ArmResult, metric: str) -> list[str]:
    show = _formatter(metric)
    compared = arm.comparison
    return [
        arm.name,
        arm.method,
        "-" if arm.rank is None else str(arm.rank),
        f"{arm.num_trainable_parameters:,}",
        "-" if arm.learning_rate is None else f"{arm.learning_rate:g}{'!' * arm.at_edge}",
        _with_spread(arm.mean, arm.std, show),
        str(len(arm.values)),
        "" if compared is None else _with_spread(compared.mean, compared.std, show, sign="+"),
        "" if compared is None else f"{compared.p_value:.2g}",
    ]


def _formatter(metric: str) -> Callable[[float, str], str]:
    """Accuracies are shown in per cent."""
    if metric == "accuracy":
        return lambda value, sign: f"{100 * value:{sign}.2f}"
    return lambda value, sign: f"{value:{sign}.4f}"


def _with_spread(
    mean: float | None, std: float | None, show: Callable[[float, str], str], sign: str = ""
) -> str:
    if mean is None:
        return "-"
    return show(mean, sign) + ("" if std is None else f" ± {show(std, '')}")
