"""The memory column of Tables 1 to 3, simulated at the paper's own sizes."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pacatune.experiments.paper.tables import Quantity, Row, Table
from pacatune.experiments.reproduce.cells import Cell
from pacatune.experiments.reproduce.compare import Column
from pacatune.experiments.reproduce.experiment import Results
from pacatune.experiments.reproduce.measured import Measured
from pacatune.experiments.reproduce.simulate import GB, describe, setting_of, simulate_peak
from pacatune.measure.setting import Setting

__all__ = ["KEY", "memory_cells", "memory_column", "simulated_memory"]

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
