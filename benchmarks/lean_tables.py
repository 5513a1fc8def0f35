"""The tables of lean levels, and of the longest sequences, simulated."""

import json
from pathlib import Path
from typing import Any

from benchmarks.lean_variants import VARIANTS
from pacatune.methods import METHODS
from pacatune.reports.provenance import commit_text, versions_text
from pacatune.reports.tables import table_lines

__all__ = ["NAMES", "table"]

_FILES = {
    "lean-units": "lean",
    "lean-times": "lean",
    "lengths": "lengths",
    "small-lengths": "lengths",
}
NAMES = tuple(_FILES)


def table(name: str, results: Path) -> str:
    """Return one table as Markdown, and where it comes from."""
    file = _FILES[name]
    path = results / f"{file}.json"
    if not path.is_file():
        return f"Not measured yet: `python -m benchmarks.{file}` writes it."
    result = json.loads(path.read_text(encoding="utf-8"))
    lines = {
        "lean-units": _units,
        "lean-times": _times,
        "lengths": _lengths,
        "small-lengths": _small_lengths,
    }[name](result)
    clock = "processor time " if result.get("settings", {}).get("processor_time") else ""
    device = f"{clock}on {result['device']}, " if name == "lean-times" else ""
    source = (
        f"`{result['command']}`{commit_text(result)} wrote `benchmarks/results/{file}.json` "
        f"({device}{versions_text(result['versions'])})."
    )
    return "\n".join([*lines, "", source])


def _units(result: dict[str, Any]) -> list[str]:
    """A line per variant, a column per method and dtype of its adapters; without padding."""
    units = {
        (row["variant"], row["method"], row["adapters"]): row["units"]
        for row in result["counts"]
        if not row["is_padded"]
    }
    columns = list(dict.fromkeys((method, adapters) for _, method, adapters in units))
    titles = ["", *(_title(method, adapters) for method, adapters in columns)]
    rows = []
    for variant, (description, _) in VARIANTS.items():
        numbers = [units.get((variant, *column)) for column in columns]
        if any(number is not None for number in numbers):
            cells = ["" if number is None else f"{number:.2f}" for number in numbers]
            rows.append([f"{variant}: {description}", *cells])
    return table_lines(titles, rows)


def _title(method: str, adapters: str) -> str:
    title = METHODS[method].title
    finer = ", float32 adapters" if adapters == "float32" and not METHODS[method].is_paca else ""
    return title + finer


def _times(result: dict[str, Any]) -> list[str]:
    """A line per variant, a column per method and setting."""
    ratios = {
        (row["variant"], row["method"], row["setting"]): row
        for row in result["ratios"]
        if row["reference"] == "level 1"
    }
    columns = list(dict.fromkeys((method, setting) for _, method, setting in ratios))
    titles = ["", *(f"{METHODS[method].title}, {setting}" for method, setting in columns)]
    rows = []
    for variant in dict.fromkeys(name for name, _, _ in ratios):
        found = (ratios[(variant, *column)] for column in columns)
        cells = [f"{row['ratio']:.2f} ({row['low']:.2f}-{row['high']:.2f})" for row in found]
        rows.append([variant, *cells])
    return table_lines(titles, rows)


def _lengths(result: dict[str, Any]) -> list[str]:
    titles = ["method", "adapters", "level", "", "tokens", "kept per token, KB"]
    rows = []
    for row in result["rows"]:
        more = [name for name in ("checkpointing", "offloading") if row[name]]
        kept = f"{row['saved_bytes_per_token'] / 1e3:.0f}"
        cells = [METHODS[row["method"]].title, row["adapters"], str(row["level"]), *(more or [""])]
        rows.append([*cells, f"{row['max_seq_len']:,}", kept])
    return table_lines(titles, rows, "llll")


def _small_lengths(result: dict[str, Any]) -> list[str]:
    """A line per model: the longest sequence without and with checkpointing."""
    longest: dict[tuple[str, str], dict[bool, str]] = {}
    for row in result["small_rows"]:
        base = "bfloat16" if row["quantization"] is None else f"{row['quantization']} (QPaCA)"
        by_way = longest.setdefault((row["model"], base), {})
        by_way[row["checkpointing"]] = f"{row['max_seq_len']:,}"
    titles = ["model", "base", "tokens, `lean_level: 2`", "tokens, checkpointing too"]
    rows = [[*what, by[False], by[True]] for what, by in longest.items()]
    return table_lines(titles, rows, "llr")
