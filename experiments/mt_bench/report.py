"""From judgments to what a reader sees: a table, and a page of Markdown around it."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments.mt_bench.questions import TEMPERATURES
from pacatune.reports.rows import Table

NUM_RESAMPLES = 10_000
_HEADINGS = (
    *("category", "turn 1", "turn 2", "both", "95% interval"),
    *("questions", "judged turns", "failed"),
)


def make_table(judgments: Sequence[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Return a line for each category that was judged, and one of all, for JSON.

    Means are over judged turns, as in FastChat; turns without a score count as failed only. The
    interval (`low`, `high`) tells how much the mean would vary with other questions of the kind,
    which are resampled with replacement, both turns of one together; one question has none. It
    says nothing about the judge.
    """
    generator = np.random.default_rng(seed)
    by_category = {
        category: [one for one in judgments if one["category"] == category]
        for category in TEMPERATURES
    }
    lines = [_line(name, own, generator) for name, own in by_category.items() if own]
    return [*lines, _line("all", judgments, generator)]


def _line(
    name: str, judgments: Sequence[dict[str, Any]], generator: np.random.Generator
) -> dict[str, Any]:
    judged = [one for one in judgments if one["score"] is not None]
    low, high = _interval(judged, generator)
    return {
        "name": name,
        "turn_1": _mean([one["score"] for one in judged if one["turn"] == 1]),
        "turn_2": _mean([one["score"] for one in judged if one["turn"] == 2]),
        "mean": _mean([one["score"] for one in judged]),
        "low": low,
        "high": high,
        "num_questions": len({one["question_id"] for one in judgments}),
        "num_judged": len(judged),
        "num_failed": len(judgments) - len(judged),
    }


def _mean(scores: Sequence[float]) -> float | None:
    return sum(scores) / len(scores) if scores else None


def _interval(
    judged: Sequence[dict[str, Any]], generator: np.random.Generator
) -> tuple[float | None, float | None]:
    by_question = defaultdict(list)
    for one in judged:
        by_question[one["question_id"]].append(one["score"])
    if len(by_question) < 2:
        return None, None
    sums = np.array([sum(scores) for scores in by_question.values()], dtype=np.float64)
    counts = np.array([len(scores) for scores in by_question.values()])
    drawn = generator.integers(len(sums), size=(NUM_RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def to_markdown(result: dict[str, Any]) -> str:
    """Return what mt_bench.json holds as a page: the table, and what must be known to read it."""
    shown = Table(header=list(_HEADINGS), cells=[_cells(line) for line in result["table"]])
    lines = [f"# MT-Bench: {result['model_id']}", "", *shown.markdown()]
    return "\n".join([*lines, "", *(f"- {note}" for note in _notes(result))]) + "\n"


def _cells(line: dict[str, Any]) -> list[str]:
    scores = [line["turn_1"], line["turn_2"], line["mean"]]
    return [
        line["name"],
        *("-" if score is None else f"{score:.2f}" for score in scores),
        "-" if line["low"] is None else f"{line['low']:.2f} to {line['high']:.2f}",
        *(str(line[name]) for name in ("num_questions", "num_judged", "num_failed")),
    ]


def _notes(result: dict[str, Any]) -> Iterator[str]:
    judge = result["judge"]
    yield (
        f"Judge: {judge['model']} ({', '.join(judge['models'])}) at {judge['url']}, temperature "
        f"{', '.join(judge['temperatures'])}. Scores depend on the judge: only those of the same "
        "judge, prompts and references compare."
    )
    yield (
        f"Questions: {result['questions']}; references: {result['references'] or 'their own'}; "
        f"judge prompts: {result['judge_prompts']}."
    )
    yield (
        f"Intervals: {NUM_RESAMPLES:,} resamples of the questions (seed {result['seed']}); they "
        "say nothing about the judge or about other samples of answers."
    )
    if cut := result["cut_off"]:
        yield f"Turns cut off: {', '.join(f'{count} by {why}' for why, count in cut.items())}."
    if failures := result["failures"]:
        first = failures[0]
        yield (
            f"{len(failures)} turns have no score, and no mean counts them: {first['problem']} "
            f"(question {first['question_id']}, turn {first['turn']}; all are in the JSON file)."
        )
