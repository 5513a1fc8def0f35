"""From judgments to what a reader sees: table, terminal, page of Markdown, radar plot."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pacatune.evaluation.mt_bench.judging import HIGHEST, Judgment
from pacatune.evaluation.mt_bench.questions import TEMPERATURES
from pacatune.reports.figures import new_figure, plain_text, save_figure
from pacatune.reports.tables import table_lines

NUM_RESAMPLES = 10_000
_CONFIDENCE = 0.95
_MIN_CATEGORIES = 3
_MAX_FAILURES_SHOWN = 10
_CUTS = {
    "length": "turns as long as --max-new-tokens allows",
    "context": "turns cut off by the model's context",
    "no_room": "turns left empty, since their question did not fit into the model's context",
}


def make_table(judgments: Sequence[Judgment], seed: int = 0) -> list[dict[str, Any]]:
    """Return a line for each category that was judged, and one of all, for JSON.

    Means are over judged turns, as in FastChat; turns without a score count as failed only. The
    interval (`low`, `high`) tells how much the mean would vary with other questions of the kind,
    which are resampled with replacement, both turns of one together; one question has none. It
    says nothing about the judge.
    """
    generator = np.random.default_rng(seed)
    by_category = {
        category: [one for one in judgments if one.category == category]
        for category in TEMPERATURES
    }
    lines = [_line(name, own, generator) for name, own in by_category.items() if own]
    return [*lines, _line("all", judgments, generator)]


def _line(
    name: str, judgments: Sequence[Judgment], generator: np.random.Generator
) -> dict[str, Any]:
    scores = [one.score for one in judgments if one.score is not None]
    low, high = _score_interval(judgments, generator)
    return {
        "name": name,
        "turn_1": _mean([one.score for one in judgments if one.turn == 1]),
        "turn_2": _mean([one.score for one in judgments if one.turn == 2]),
        "mean": _mean(scores),
        "low": low,
        "high": high,
        "num_questions": len({one.question_id for one in judgments}),
        "num_judged": len(scores),
        "num_failed": len(judgments) - len(scores),
    }


def _mean(scores: Sequence[int | float | None]) -> float | None:
    found = [score for score in scores if score is not None]
    return sum(found) / len(found) if found else None


def _score_interval(
    judgments: Sequence[Judgment], generator: np.random.Generator
) -> tuple[float | None, float | None]:
    by_question: dict[Any, list[int | float]] = {}
    for one in judgments:
        if one.score is not None:
            by_question.setdefault(one.question_id, []).append(one.score)
    if len(by_question) < 2:
        return None, None
    sums = np.array([sum(scores) for scores in by_question.values()], dtype=np.float64)
    counts = np.array([len(scores) for scores in by_question.values()])
    drawn = generator.integers(len(sums), size=(NUM_RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def draw_radar(lines: Sequence[dict[str, Any]], title: str, path: Path) -> bool:
    """Draw a corner for each category, as FastChat does; say whether there were enough."""
    scored = [line for line in lines[:-1] if line["mean"] is not None]
    if len(scored) < _MIN_CATEGORIES:
        return False
    figure = new_figure(6.4, 6.4)
    axes = figure.add_subplot(projection="polar")
    angles = [2 * math.pi * place / len(scored) for place in range(len(scored))]
    closed = [*angles, angles[0]]
    for name, label, style in (
        ("turn_1", "turn 1", "--"),
        ("turn_2", "turn 2", ":"),
        ("mean", "both turns", "-"),
    ):
        # A category without a score in one turn leaves a gap.
        values = [math.nan if line[name] is None else line[name] for line in scored]
        axes.plot(closed, [*values, values[0]], style, label=label)
    axes.fill(closed, [*values, values[0]], alpha=0.15)
    axes.set_xticks(angles, [line["name"] for line in scored])
    axes.tick_params(axis="x", pad=16)
    axes.set_ylim(0, HIGHEST)
    axes.set_title(plain_text(title), fontsize="medium")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.1, -0.12), fontsize="small")
    save_figure(figure, path)
    return True


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "category": lambda line: line["name"],
    "turn 1": lambda line: _score(line["turn_1"]),
    "turn 2": lambda line: _score(line["turn_2"]),
    "both": lambda line: _score(line["mean"]),
    "95% interval": lambda line: (
        "-" if line["low"] is None else f"{line['low']:.2f} to {line['high']:.2f}"
    ),
    "questions": lambda line: str(line["num_questions"]),
    "judged turns": lambda line: str(line["num_judged"]),
    "failed": lambda line: str(line["num_failed"]),
}


def print_result(result: dict[str, Any], console: Console) -> None:
    """Print what mt_bench.json holds: the table, and what must be known to read it."""
    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(_COLUMNS):
        table.add_column(title, justify="right" if number else "left")
    for line in result["table"]:
        style = "bold" if line["name"] == "all" else ""
        table.add_row(*(show(line) for show in _COLUMNS.values()), style=style)
    console.print(table)
    console.print()
    for note in _notes(result):
        console.print(Text(note, style="dim"), soft_wrap=True)


def to_markdown(result: dict[str, Any], radar: str | None) -> str:
    """Return the same as a page, with the picture of that name."""
    rows = [[show(line) for show in _COLUMNS.values()] for line in result["table"]]
    parts = [f"# MT-Bench: {result['model_id']}", "", *table_lines(list(_COLUMNS), rows)]
    parts += ["", *(f"- {_escaped(note)}" for note in _notes(result))]
    if radar is not None:
        parts += ["", f"![scores by category]({radar})"]
    return "\n".join(parts) + "\n"


def _notes(result: dict[str, Any]) -> Iterator[str]:
    judge, sources = result["judge"], result["sources"]
    reported = ", ".join(judge["models"])
    also = f", which says it is {reported}" if reported and reported != judge["model"] else ""
    yield (
        f"Judge: {judge['model']}{also}, at {judge['url']}. Scores depend on the judge: only those "
        "of the same judge, prompts and references compare."
    )
    if None in judge["temperatures"]:
        yield "The judge knows no temperature but its own: another run grades a little otherwise."
    yield (
        f"Questions: {sources['questions']}; references: {sources['references']}; judge prompts: "
        f"{sources['judge_prompts']}."
    )
    yield (
        f"Intervals: {result['num_resamples']:,} resamples of the questions (seed "
        f"{result['seed']}); they say nothing about the judge or about other samples of answers."
    )
    if result["cut_off"]:
        counts = ", ".join(f"{count} {_CUTS[name]}" for name, count in result["cut_off"].items())
        yield f"Answers: {counts}."
    failures = result["failures"]
    if failures:
        yield f"{len(failures)} turns have no score; no mean counts them:"
    for failure in failures[:_MAX_FAILURES_SHOWN]:
        yield f"question {failure['question_id']}, turn {failure['turn']}: {failure['problem']}"
    if len(failures) > _MAX_FAILURES_SHOWN:
        yield f"and {len(failures) - _MAX_FAILURES_SHOWN} more, in the JSON file."


def _escaped(text: str) -> str:
    # Judges and models write what they like.
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text)
