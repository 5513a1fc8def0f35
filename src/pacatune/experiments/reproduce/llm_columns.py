"""Time and memory of Tables 1 to 3 at the small scale: steps of a small Llama, in turns."""

from collections.abc import Mapping
from typing import Any

from pacatune.experiments.paper.tables import Quantity, Row, Table
from pacatune.experiments.reproduce.bench_cells import row_of, steps_of_ours
from pacatune.experiments.reproduce.compare import Column
from pacatune.experiments.reproduce.measured import Measured

__all__ = ["MODEL", "bench_columns", "bench_numbers", "full_columns", "full_numbers"]

# The model of the paper whose lines small numbers stand beside.
MODEL = "llama3-8b"
_TIME, _KEPT, _PEAK = "small_time", "small_kept", "small_peak"
_FULL = {"memory": "full_memory", "time": "full_time"}
_MB = 10**6
# In a narrow model a rank weighs more than in the paper's; peaks of a few megabytes are not exact.
_MARGINS = {_TIME: 0.02, _KEPT: 0.05, _PEAK: 0.1}


def bench_columns(table: Table, about: str) -> list[Column]:
    """Return the columns of what `bench_numbers` gives.

    Args:
        table: The paper's.
        about: What was measured where, a sentence or two.
    """
    memory, time = table.quantity("memory"), table.quantity("time")
    titles = (
        (_TIME, "time of a step, small model", "of PaCA's", time),
        (_KEPT, "kept for backward, small model", "MB", memory),
        (_PEAK, "peak of a process, small model", "MB", memory),
    )
    return [
        Column(
            quantity=Quantity(
                key=key, title=title, unit=unit, kind=paper.kind, margin=_MARGINS[key]
            ),
            paper=paper,
            is_same=False,
            about=about,
        )
        for key, title, unit, paper in titles
    ]


def bench_numbers(
    table: Table, result: dict[str, Any], names: Mapping[str, str]
) -> dict[tuple[str, str], Measured]:
    """Return time, kept bytes and peak of each line that was measured.

    Args:
        table: The paper's.
        result: Of a bench cell.
        names: Method of the paper -> of `pacatune bench`.
    """
    found: dict[tuple[str, str], Measured] = {}
    times = steps_of_ours(result)
    for method, name in names.items():
        row, line = row_of(result, name), _line(table, method)
        if not row or line is None:
            continue
        if name in times:
            found[line.key, _TIME] = times[name]
        found[line.key, _KEPT] = Measured.exact(row["saved_bytes"] / _MB, "counted")
        if row["peak_bytes"] is not None:
            found[line.key, _PEAK] = Measured.exact(row["peak_bytes"] / _MB, "measured")
    return found


def _line(table: Table, method: str) -> Row | None:
    """Return the first line of a method: that of the smallest rank."""
    for row in table.rows:
        if row.model == MODEL and row.method == method:
            return row
    return None


def full_columns(table: Table) -> list[Column]:
    """Return the columns of what is measured at the paper's own size."""
    return [
        Column(
            quantity=Quantity(
                key=key,
                title=f"{table.quantity(name).title}, measured",
                unit=table.quantity(name).unit,
                kind=table.quantity(name).kind,
                margin=table.quantity(name).margin,
            ),
            paper=table.quantity(name),
            is_same=True,
            about="By `pacatune train`, on the accelerator named below.",
        )
        for name, key in _FULL.items()
    ]


def full_numbers(table: Table, row: Row, result: dict[str, Any]) -> dict[tuple[str, str], Measured]:
    """Return memory and time of a line that was trained in full.

    Args:
        table: The paper's.
        row: The line.
        result: With `peak_memory_bytes` and `training_ms`.
    """
    unit_ms = {"h": 3.6e6, "min": 6e4}[table.quantity("time").unit]
    return {
        (row.key, _FULL["memory"]): Measured.exact(result["peak_memory_bytes"] / 1e9, "measured"),
        (row.key, _FULL["time"]): Measured.exact(result["training_ms"] / unit_ms, "measured"),
    }
