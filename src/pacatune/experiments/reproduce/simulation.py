"""The memory columns at the paper's own sizes, by `pacatune.memory`: no GPU, no weights.

What the tables of settings leave open is taken from the authors' repository (commit be9a806):
weights and adapters in 16 bits, all logits, no gradient checkpointing.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pacatune.experiments.paper import settings
from pacatune.experiments.paper.tables import Quantity, Row, Table
from pacatune.experiments.reproduce.experiment import Cell, Results
from pacatune.experiments.reproduce.section import Measured
from pacatune.experiments.reproduce.verdicts import Column
from pacatune.memory.setting import Setting

__all__ = [
    "GB",
    "KEY",
    "describe",
    "memory_cells",
    "memory_column",
    "setting_of",
    "simulate_length",
    "simulate_peak",
    "simulated_memory",
]


GB = 10**9
# Two lengths between which a line is drawn.
_LENGTHS = (256, 512)
_COMMON: dict[str, Any] = {"lean": "off", "loss": "logits", "adapter_dtype": "bfloat16"}


def setting_of(table: str, row: Row) -> Setting:
    """Return what is simulated for a line of Table 1, 2, 3 or 4.

    Args:
        table: Name of the table.
        row: A line with a method that trains.
    """
    rank = row.rank or 8
    if table == "table1":
        stated = settings.table_9(row.model, row.method, rank)
    elif table == "table2":
        stated = settings.table_10(rank)
    elif table == "table3":
        stated = settings.table_11(row.model)
    else:
        stated = settings.table_12(row.method)
    micro_batches = stated.micro_batches or 1
    return Setting(
        model=row.model,
        method=row.method,
        rank=rank,
        dropout=stated.dropout or 0.0,
        batch_size=(stated.batch_size or 1) // micro_batches,
        gradient_accumulation=micro_batches,
        seq_len=stated.seq_len or 512,
        **_COMMON,
    )


def describe(setting: Setting) -> str:
    """Return the sizes of a setting in words."""
    dropout = f", dropout {setting.dropout:g}" if setting.dropout else ""
    return (
        f"{setting.batch_size} x {setting.seq_len} tokens per micro-batch, "
        f"{setting.gradient_accumulation} per step, rank {setting.rank}{dropout}"
    )


def simulate_peak(setting: Setting, explain_gb: float | None = None) -> dict[str, Any]:
    """Return the peak of a step in bytes.

    Args:
        setting: What is simulated.
        explain_gb: Also find how many tokens per micro-batch take this much: where the paper names
            the longest text only, not the usual one.
    """
    from pacatune.memory.estimate import estimate_memory

    estimate = estimate_memory(setting)
    result: dict[str, Any] = {
        "peak_bytes": estimate.peak_bytes,
        "low_bytes": estimate.low_bytes,
        "high_bytes": estimate.high_bytes,
        "by_category": dict(estimate.measured.by_category),
    }
    if explain_gb is not None:
        result["tokens"] = setting.batch_size * setting.seq_len
        result["tokens_that_explain_it"] = tokens_for(setting, explain_gb * GB)
    return result


def tokens_for(setting: Setting, num_bytes: float) -> int:
    """Return the tokens of a micro-batch that take so much, by the line through two lengths."""
    from pacatune.memory.estimate import estimate_memory

    short, long = (
        estimate_memory(setting.but(batch_size=1, seq_len=length)).peak_bytes for length in _LENGTHS
    )
    per_token = (long - short) / (_LENGTHS[1] - _LENGTHS[0])
    return round(_LENGTHS[0] + (num_bytes - short) / per_token)


def simulate_length(setting: Setting, available_bytes: int) -> dict[str, Any]:
    """Return the longest sequence that surely fits, found by bisection.

    Args:
        setting: Everything but the length.
        available_bytes: Memory of the device.
    """
    from pacatune.memory.estimate import find_max

    longest, estimate = find_max(setting, "seq_len", available_bytes)
    peak = 0 if estimate is None else estimate.peak_bytes
    notes = [] if estimate is None else list(estimate.measured.notes)
    return {"max_seq_len": longest, "peak_bytes": peak, "notes": notes}


KEY = "simulated_memory"
_UNTRAINED = ("none", "quantized")
_NAME = "simulate-{}"


def memory_cells(table: Table, *, explain: bool = False) -> list[Cell]:
    """Return a cell for each line that trains.

    Args:
        table: Table 1, 2 or 3.
        explain: Also find how many tokens explain the paper's memory.
    """
    return [_cell(table, row, explain) for row in table.rows if row.method not in _UNTRAINED]


def _cell(table: Table, row: Row, explain: bool) -> Cell:
    setting = setting_of(table.name, row)
    explained = row.values["memory"] if explain else None
    return Cell(
        key=_NAME.format(row.key),
        title=f"simulating {row.title} on {row.model}: {describe(setting)}",
        methods=(row.method,),
        inputs={**asdict(setting), "explain_gb": explained},
        run=partial(_simulate, setting, explained),
    )


def _simulate(
    setting: Setting, explained: float | None, folder: Path, tell: Callable[[str], None]
) -> dict[str, Any]:
    return simulate_peak(setting, explained)


def memory_column(table: Table) -> Column:
    """Return the column of the simulated memory."""
    paper = table.quantity("memory")
    return Column(
        quantity=Quantity(
            key=KEY,
            title="memory at the paper's own size",
            unit="GB",
            kind="memory",
            margin=paper.margin,
        ),
        paper=paper,
        is_same=True,
        about="Ours is simulated by `pacatune estimate`: the most that the tensors of a training "
        "step take at once. A real GPU also holds a CUDA context of about half a gigabyte and gaps "
        "between blocks, and the paper prints whole gigabytes.",
    )


def simulated_memory(table: Table, results: Results) -> dict[tuple[str, str], Measured]:
    """Return the simulated numbers of all lines that there are."""
    found = {}
    for row in table.rows:
        result = results.get(_NAME.format(row.key))
        if result is not None:
            number = Measured.exact(result["peak_bytes"] / GB, "simulated", _explained(result))
            found[row.key, KEY] = number
    return found


def _explained(result: dict[str, Any]) -> str:
    if "tokens_that_explain_it" not in result:
        return ""
    return (
        f"{result['tokens_that_explain_it']:,} tokens per micro-batch would take the paper's "
        f"memory, {result['tokens']:,} are the most that its settings allow"
    )
