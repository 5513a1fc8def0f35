"""The tables of docs/memory.md, from benchmarks/results/estimate.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pacatune.methods import METHODS
from pacatune.reports.provenance import commit_text, versions_text
from pacatune.reports.tables import table_lines

__all__ = ["table"]


def table(number: str, results: Path) -> str:
    """Return one table as Markdown, and where it comes from."""
    path = results / "estimate.json"
    if not path.is_file():
        return "Not made yet: `python -m benchmarks.estimate` writes `results/estimate.json`."
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = _TABLES[number](result[f"table_{number}"])
    return "\n".join([*rows, "", _source(result)])


def _table_1(rows: list[dict[str, Any]]) -> list[str]:
    header = ["model", "method", "rank", "paper, GB", "ours, GB", "difference"]
    cells = [
        [
            row["model"],
            METHODS[row["method"]].title,
            str(row["rank"]),
            str(row["paper_gb"]),
            f"{row['simulated_gb']:.1f}",
            f"{row['difference']:+.1%}",
        ]
        for row in rows
    ]
    return table_lines(header, cells, "llr")


def _table_3(rows: list[dict[str, Any]]) -> list[str]:
    header = ["model", "method", "paper, GB", "ours, GB, longest texts", "with checkpointing"]
    header += ["tokens, longest texts", "tokens that give the paper's GB"]
    cells = [
        [
            row["model"],
            METHODS[row["method"]].title,
            str(row["paper_gb"]),
            f"{row['simulated_gb']:.1f} ({row['difference']:+.0%})",
            f"{row['checkpointed_gb']:.1f}",
            f"{row['tokens']:,}",
            f"{row['tokens_that_explain_it']:,}",
        ]
        for row in rows
    ]
    return table_lines(header, cells, "llr")


def _table_4(rows: list[dict[str, Any]]) -> list[str]:
    header = ["method", "dropout", "lean", "paper, tokens", "ours, tokens", "difference"]
    cells = [
        [
            METHODS[row["method"]].title,
            f"{row['dropout']:g}",
            str(row["lean"]),
            "" if row["paper"] is None else f"{row['paper']:,}",
            f"{row['max_seq_len']:,}",
            "" if row["paper"] is None else f"{row['difference']:+.1%}",
        ]
        for row in rows
    ]
    return table_lines(header, cells, "lrlr")


_TABLES: dict[str, Callable[[list[dict[str, Any]]], list[str]]] = {
    "1": _table_1,
    "3": _table_3,
    "4": _table_4,
}


def _source(result: dict[str, Any]) -> str:
    return (
        "Paper: S. Woo et al., ICLR 2025. Ours: simulated, with "
        f"{versions_text(result['versions'])}. `{result['command']}`{commit_text(result)} wrote "
        "`benchmarks/results/estimate.json`."
    )
