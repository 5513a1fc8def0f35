"""The tables of docs/memory.md, from benchmarks/results/estimate.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pacatune.methods import METHODS

__all__ = ["table"]


def table(number: str, results: Path) -> str:
    """Return one table as Markdown, and where it comes from.

    Args:
        number: Of the paper's table: 1, 3 or 4.
        results: Folder of the result.
    """
    path = results / "estimate.json"
    if not path.is_file():
        return "Not made yet: `python -m benchmarks.estimate` writes `results/estimate.json`."
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = _TABLES[number](result[f"table_{number}"])
    return "\n".join([*rows, "", _source(result)])


def _table_1(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "| model | method | rank | paper, GB | ours, GB | difference |",
        "|---|---|--:|--:|--:|--:|",
        *(
            f"| {row['model']} | {METHODS[row['method']].title} | {row['rank']} "
            f"| {row['paper_gb']} | {row['simulated_gb']:.1f} | {row['difference']:+.1%} |"
            for row in rows
        ),
    ]


def _table_3(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "| model | method | paper, GB | ours, GB, longest texts | with checkpointing "
        "| tokens, longest texts | tokens that give the paper's GB |",
        "|---|---|--:|--:|--:|--:|--:|",
        *(
            f"| {row['model']} | {METHODS[row['method']].title} | {row['paper_gb']} "
            f"| {row['simulated_gb']:.1f} ({row['difference']:+.0%}) "
            f"| {row['checkpointed_gb']:.1f} | {row['tokens']:,} "
            f"| {row['tokens_that_explain_it']:,} |"
            for row in rows
        ),
    ]


def _table_4(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| method | dropout | lean | paper, tokens | ours, tokens | difference |"]
    lines.append("|---|--:|---|--:|--:|--:|")
    for row in rows:
        paper = "" if row["paper"] is None else f"{row['paper']:,}"
        difference = "" if row["paper"] is None else f"{row['difference']:+.1%}"
        lines.append(
            f"| {METHODS[row['method']].title} | {row['dropout']:g} | {row['lean']} | {paper} "
            f"| {row['max_seq_len']:,} | {difference} |"
        )
    return lines


_TABLES: dict[str, Callable[[list[dict[str, Any]]], list[str]]] = {
    "1": _table_1,
    "3": _table_3,
    "4": _table_4,
}


def _source(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    changes = ", with changes that were not committed," if result["is_modified"] else ""
    return (
        f"Paper: S. Woo et al., ICLR 2025. Ours: simulated, with {versions}. "
        f"`{result['command']}` at commit {result['commit'][:9]}{changes} wrote "
        "`benchmarks/results/estimate.json`."
    )
