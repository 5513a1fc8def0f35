"""The memory columns at the paper's own sizes, by `pacatune.measure`: no GPU, no weights.

What the tables of settings leave open is taken from the authors' repository (commit be9a806):
weights and adapters in 16 bits, all logits, no gradient checkpointing.
"""

from dataclasses import asdict
from typing import Any

from pacatune.experiments.reproduce.comparison import Source
from pacatune.experiments.reproduce.experiment import Cell, Measured, Results
from pacatune.experiments.reproduce.verdicts import same_column
from pacatune.measure.setting import Setting
from pacatune.paper.settings import of_line
from pacatune.paper.tables import Row, Table

GB = 10**9
# Two lengths between which a line is drawn.
_LENGTHS = (256, 512)


def make_setting(model: str, method: str, **sizes: Any) -> Setting:
    """Return a setting as the authors' code computes."""
    return Setting(
        model=model, method=method, lean="off", loss="logits", adapter_dtype="bfloat16", **sizes
    )


def setting_of(table: str, row: Row) -> Setting:
    """Return what is simulated for a line of Table 1, 2, 3 or 4 with a method that trains."""
    stated = of_line(table, row)
    micro_batches = stated.micro_batches or 1
    return make_setting(
        row.model,
        row.method,
        rank=row.rank or 8,
        dropout=stated.dropout or 0.0,
        batch_size=(stated.batch_size or 1) // micro_batches,
        gradient_accumulation=micro_batches,
        seq_len=stated.seq_len or 512,
    )


def describe(setting: Setting) -> str:
    """Return the sizes of a setting in words."""
    dropout = f", dropout {setting.dropout:g}" if setting.dropout else ""
    return (
        f"{setting.batch_size} x {setting.seq_len} tokens per micro-batch, "
        f"{setting.gradient_accumulation} per step, rank {setting.rank}{dropout}"
    )


def simulate_peak(setting: Setting, explain_gb: float | None = None) -> dict[str, Any]:
    """Return the peak of a step in bytes, and how many tokens per micro-batch take so many GB."""
    from pacatune.measure.estimate import estimate_memory

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
    from pacatune.measure.estimate import estimate_memory

    short, long = (
        estimate_memory(setting.but(batch_size=1, seq_len=length)).peak_bytes for length in _LENGTHS
    )
    per_token = (long - short) / (_LENGTHS[1] - _LENGTHS[0])
    return round(_LENGTHS[0] + (num_bytes - short) / per_token)


def simulate_length(setting: Setting, available_bytes: int) -> dict[str, Any]:
    """Return the longest sequence that surely fits into so much memory, found by bisection."""
    from pacatune.measure.estimate import find_max

    longest, estimate = find_max(setting, "seq_len", available_bytes)
    peak = 0 if estimate is None else estimate.peak_bytes
    notes = [] if estimate is None else list(estimate.measured.notes)
    return {"max_seq_len": longest, "peak_bytes": peak, "notes": notes}


def memory_source(table: Table, *, explain: bool = False) -> Source:
    """Return the simulated memory of Table 1, 2 or 3.

    With `explain`, also how many tokens take the paper's memory: where it names the longest text
    only, not the usual one.
    """

    def cell(row: Row) -> Cell:
        setting = setting_of(table.name, row)
        explain_gb = row.values["memory"] if explain else None
        return Cell(
            key=f"simulate-{row.key}",
            title=f"simulating {row.title} on {row.model}: {describe(setting)}",
            methods=(row.method,),
            inputs={**asdict(setting), "explain_gb": explain_gb},
            run=lambda folder, tell: simulate_peak(setting, explain_gb),
        )

    def numbers(results: Results) -> dict[str, Measured]:
        return {
            row.key: Measured.exact(result["peak_bytes"] / GB, "simulated", _note(result))
            for row in table.rows
            if (result := results.get(f"simulate-{row.key}")) is not None
        }

    column = same_column(
        table.quantity("memory"),
        "simulated_memory",
        "memory at the paper's own size",
        "Ours is simulated by `pacatune estimate`: the most that the tensors of a training "
        "step take at once. A real GPU also holds a CUDA context of about half a gigabyte and gaps "
        "between blocks, and the paper prints whole gigabytes.",
    )
    return Source(
        cells=[cell(row) for row in table.rows if row.is_trained],
        columns=lambda results: [(column, numbers(results))],
    )


def _note(result: dict[str, Any]) -> str:
    if "tokens_that_explain_it" not in result:
        return ""
    return (
        f"{result['tokens_that_explain_it']:,} tokens per micro-batch would take the paper's "
        f"memory, {result['tokens']:,} are the most that its settings allow"
    )
