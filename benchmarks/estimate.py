"""Hold `pacatune estimate` against the memory that the paper reports: Tables 1, 3 and 4.

    python -m benchmarks.estimate

Nothing is measured and no GPU is needed: every number follows from the code and the versions of
its packages, on any machine. Takes seven minutes.
"""

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks.record import compute
from pacatune.experiments.reproduce.simulation import setting_of, tokens_for
from pacatune.measure.device import gpu_bytes
from pacatune.measure.estimate import Estimate, estimate_memory, find_max
from pacatune.measure.setting import Setting
from pacatune.paper import TABLES
from pacatune.paper.tables import GPU, Row

__all__ = ["main", "rows_of_table_1", "rows_of_table_3", "rows_of_table_4"]

_GB = 10**9


def rows_of_table_1(models: Collection[str] = ()) -> list[dict[str, Any]]:
    """Compare every cell of Table 1's memory column, or those of some models."""
    rows = []
    for row in _rows("table1"):
        if models and row.model not in models:
            continue
        estimate = estimate_memory(setting_of("table1", row))
        names = {"model": row.model, "method": row.method, "rank": row.rank}
        rows.append({**names, **_compare(estimate, row.values["memory"])})
    return rows


def rows_of_table_3() -> list[dict[str, Any]]:
    """Compare Table 3 at the longest texts, and find how many tokens explain it.

    The texts are shorter than the limit, and the paper does not say by how much.
    """
    rows = []
    for row in _rows("table3"):
        setting, reported = setting_of("table3", row), row.values["memory"]
        checkpointed = estimate_memory(setting.but(gradient_checkpointing=True))
        rows.append(
            {
                "model": row.model,
                "method": row.method,
                "rank": setting.rank,
                **_compare(estimate_memory(setting), reported),
                "checkpointed_gb": round(checkpointed.peak_bytes / _GB, 2),
                "tokens": setting.batch_size * setting.seq_len,
                "tokens_that_explain_it": tokens_for(setting, reported * _GB),
            }
        )
    return rows


def rows_of_table_4() -> list[dict[str, Any]]:
    """Compare the longest sequences of Table 4; with dropout too, which the paper leaves open."""
    available, rows = gpu_bytes(GPU), []
    table = {row.method: row for row in _rows("table4")}
    for method, line in table.items():
        reported = int(line.values["length"])
        for dropout in (0.0,) if method == "paca" else (0.0, 0.1):
            setting = setting_of("table4", line).but(dropout=dropout)
            rows.append({"method": method, "dropout": dropout, "lean": "off", "paper": reported})
            rows[-1] |= _longest(setting, available, reported)
    for method in ("paca", "lora"):
        setting = setting_of("table4", table[method]).but(lean="auto", loss="auto")
        rows.append({"method": method, "dropout": 0.0, "lean": "auto", "paper": None})
        rows[-1] |= _longest(setting, available, None)
    return rows


def _rows(table: str) -> list[Row]:
    """Return the lines whose memory or length the paper reports."""
    return [row for row in TABLES[table].rows if {"memory", "length"} & set(row.values)]


def _longest(setting: Setting, available: int, reported: int | None) -> dict[str, Any]:
    longest, estimate = find_max(setting, "seq_len", available)
    assert estimate is not None
    values: dict[str, Any] = {"max_seq_len": longest, "notes": estimate.measured.notes}
    if reported is not None:
        at_reported = estimate_memory(setting.but(seq_len=reported))
        values["gib_at_papers_length"] = round(at_reported.peak_bytes / 2**30, 2)
        values["difference"] = round(longest / reported - 1, 3)
    return values


def _compare(estimate: Estimate, reported: float) -> dict[str, Any]:
    return {
        "paper_gb": reported,
        "simulated_gb": round(estimate.peak_bytes / _GB, 2),
        "difference": round(estimate.peak_bytes / _GB / reported - 1, 3),
    }


def main(options: list[str] | None = None) -> Path:
    """Compare, write the result, and return its path."""
    return compute(
        "estimate",
        __doc__,
        options,
        lambda _: {
            "table_1": rows_of_table_1(),
            "table_3": rows_of_table_3(),
            "table_4": rows_of_table_4(),
        },
    )


if __name__ == "__main__":
    from pacatune.cli.options import quiet_libraries

    quiet_libraries()
    main()
    sys.exit(0)
