"""Show a result: a table for the terminal, and a page of Markdown."""

from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["COMPARISON_NOTE", "print_result", "to_markdown"]

COMPARISON_NOTE = (
    "Scores depend on the judge: only those of the same judge, prompts and references compare."
)
_MAX_FAILURES_SHOWN = 10
_COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("category", lambda line: line["name"]),
    ("turn 1", lambda line: _score(line["turn_1"])),
    ("turn 2", lambda line: _score(line["turn_2"])),
    ("both", lambda line: _score(line["mean"])),
    ("95% interval", lambda line: _interval(line)),
    ("questions", lambda line: str(line["num_questions"])),
    ("judged turns", lambda line: str(line["num_judged"])),
    ("failed", lambda line: str(line["num_failed"])),
)


def print_result(result: dict[str, Any], console: Console) -> None:
    """Print the table and what must be known to read it.

    Args:
        result: As in mt_bench.json.
        console: Where to.
    """
    table = Table(box=None, pad_edge=False)
    for number, (title, _) in enumerate(_COLUMNS):
        table.add_column(title, justify="right" if number else "left")
    for line in result["table"]:
        style = "bold" if line["name"] == "all" else ""
        table.add_row(*(show(line) for _, show in _COLUMNS), style=style)
    console.print(table)
    console.print()
    for note in _notes(result):
        console.print(Text(note, style="dim"), soft_wrap=True)


def to_markdown(result: dict[str, Any], radar: str | None) -> str:
    """Return the result as a page.

    Args:
        result: As in mt_bench.json.
        radar: Name of the picture, if there is one.
    """
    head = " | ".join(title for title, _ in _COLUMNS)
    parts = [
        f"# MT-Bench: {result['model_id']}",
        "",
        f"| {head} |",
        f"|---|{'---:|' * (len(_COLUMNS) - 1)}",
    ]
    rows = (" | ".join(show(line) for _, show in _COLUMNS) for line in result["table"])
    parts += [f"| {row} |" for row in rows]
    parts += ["", *(f"- {_escaped(note)}" for note in _notes(result))]
    if radar is not None:
        parts += ["", f"![scores by category]({radar})"]
    return "\n".join(parts) + "\n"


def _notes(result: dict[str, Any]) -> Iterator[str]:
    judge, sources = result["judge"], result["sources"]
    reported = ", ".join(judge["models"])
    also = f", which says it is {reported}" if reported and reported != judge["model"] else ""
    yield f"Judge: {judge['model']}{also}, at {judge['url']}. {COMPARISON_NOTE}"
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


_CUTS = {
    "length": "turns as long as --max-new-tokens allows",
    "context": "turns cut off by the model's context",
    "no_room": "turns left empty, since their question did not fit into the model's context",
}


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _interval(line: dict[str, Any]) -> str:
    return "-" if line["low"] is None else f"{line['low']:.2f} to {line['high']:.2f}"


def _escaped(text: str) -> str:
    # Judges and models write what they like.
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text)
