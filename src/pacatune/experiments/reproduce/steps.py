"""Cells that `pacatune bench` measures: steps of all methods in turns, or sweeps."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pacatune.experiments.reproduce.experiment import Cell
from pacatune.experiments.reproduce.section import Measured
from pacatune.experiments.reproduce.verdicts import Column
from pacatune.measure.models import llama_values, load_values
from pacatune.measure.setting import BenchConfig
from pacatune.methods import METHODS
from pacatune.paper.tables import Quantity, Row, Table

__all__ = [
    "MODEL",
    "RANK",
    "SHAPE",
    "SWEEP_LIMIT_BYTES",
    "SWEEP_SHAPE",
    "bench_cell",
    "bench_columns",
    "bench_config",
    "bench_numbers",
    "machine_of",
    "model_of",
    "phase_ratio",
    "rate_of",
    "row_of",
    "small_dtype",
    "small_rank",
    "steps_of_ours",
    "values_of",
]


Scale = Literal["small", "full"]


def bench_config(scale: Scale, methods: tuple[str, ...], **options: Any) -> BenchConfig:
    """Return what is measured at a scale: a small Llama here, LLaMA3-8B on an accelerator.

    Args:
        scale: Which model is measured.
        methods: Methods by the names of `pacatune bench`.
        **options: Further fields of BenchConfig.
    """
    if scale == "full":
        sizes = {"values": load_values("llama3-8b"), "title": "llama3-8b", "dtype": "bfloat16"}
        return BenchConfig(methods=methods, **(sizes | options))
    is_sweep = options.get("sweep") is not None
    values, title = values_of(SWEEP_SHAPE if is_sweep else SHAPE)
    small: dict[str, Any] = {"device": "cpu", "dtype": small_dtype(), "threads": _num_threads()}
    if is_sweep:
        small |= {"memory_limit": SWEEP_LIMIT_BYTES, "seconds": 1.0}
    return BenchConfig(values=values, title=title, methods=methods, **(small | options))


def _num_threads() -> int:
    from pacatune.reports.provenance import num_cores

    return num_cores()


def bench_cell(config: BenchConfig, methods: tuple[str, ...], key: str = "bench") -> Cell:
    """Return the cell of one run of `pacatune bench`.

    Args:
        config: What is measured.
        methods: For --only, by the paper's names.
        key: Key of the cell.
    """
    what = f"a sweep over {config.sweep}" if config.sweep else "steps of"
    return Cell(
        key=key,
        title=f"measuring {what} {config.title}: {', '.join(config.methods)}",
        methods=methods,
        inputs=asdict(config),
        run=partial(_measure, config),
    )


def _measure(config: BenchConfig, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    from pacatune.measure.bench import result_folder, run

    output = result_folder(folder)
    output.open()
    result = run(config, output, "pacatune reproduce", tell)
    del result["config"]
    return result


def row_of(result: dict[str, Any], method: str) -> dict[str, Any]:
    """Return the row of a method in the only setting; empty where memory ended."""
    rows = [row for row in result["rows"] if row["method"] == method]
    return rows[0] if rows and rows[0]["status"] == "measured" else {}


def steps_of_ours(result: dict[str, Any]) -> dict[str, Measured]:
    """Return each method's step as a multiple of ours, by the pairs that took turns.

    Ours is 1 by definition; the others have 95 % bootstrap intervals.
    """
    found = {}
    for ratio in result["ratios"]:
        found[ratio["method"]] = Measured.exact(1.0, "measured")
        found[ratio["reference"]] = Measured(
            value=1 / ratio["ratio"],
            low=1 / ratio["high"],
            high=1 / ratio["low"],
            origin="measured",
        )
    return found


def rate_of(point: dict[str, Any]) -> Measured:
    """Return the sentences per second of a point of a sweep, with the quartiles of its steps.

    Without an interval where the quartiles were not recorded.
    """
    ends = [point.get(f"step_ms_quartile_{number}", point["step_ms"]) for number in (3, 1)]
    low, high = (1e3 * point["num_rows"] / step_ms for step_ms in ends)
    return Measured(value=point["sentences_per_second"], low=low, high=high, origin="measured")


def phase_ratio(
    result: dict[str, Any], what: tuple[str, str], of: tuple[str, str]
) -> Measured | None:
    """Return the time of a phase of one method as a share of another's; None if not measured.

    Pairs that took turns have a bootstrap interval, others one by their quartiles.

    Args:
        result: Result of a bench cell.
        what: Method and phase: forward, backward or step.
        of: The same of what it is a share of.
    """
    pairs = {(pair["method"], pair["reference"]): pair for pair in result["ratios"]}
    first = next(iter(pairs), ("", ""))[0]
    if what[1] == of[1] and (what[0], of[0]) in pairs:
        return _ratio(pairs[what[0], of[0]], what[1])
    if what[1] == of[1] and {(first, what[0]), (first, of[0])} <= set(pairs):
        # Both took turns with the same third one, maybe at different times.
        above, below = (_ratio(pairs[first, one[0]], one[1]) for one in (of, what))
        return Measured(
            value=above.value / below.value,
            low=above.low / below.high,
            high=above.high / below.low,
            origin="measured",
        )
    ours, other = row_of(result, what[0]), row_of(result, of[0])
    if "step_ms" not in ours or "step_ms" not in other:
        return None
    key, base = f"{what[1]}_ms", f"{of[1]}_ms"
    return Measured(
        value=ours[key] / other[base],
        low=ours[f"{key}_quartile_1"] / other[f"{base}_quartile_3"],
        high=ours[f"{key}_quartile_3"] / other[f"{base}_quartile_1"],
        origin="measured",
    )


def _ratio(pair: dict[str, Any], phase: str) -> Measured:
    values = pair if phase == "step" else pair[phase]
    return Measured(
        value=values["ratio"], low=values["low"], high=values["high"], origin="measured"
    )


def model_of(result: dict[str, Any]) -> str:
    """Return the name of the model that was measured."""
    return str(result["model"]).partition(",")[0]


def small_rank(row: Row) -> int | None:
    """Return the rank of steps that are measured at the small scale, whatever the paper's."""
    return RANK if METHODS[row.method].has_adapter else None


def machine_of(result: dict[str, Any]) -> str:
    """Return what was measured where, and what else the machine did, in a sentence."""
    timed = [*result.get("rows", ()), *result.get("points", ())]
    noises = [noise["num_cores_of_others"] for row in timed for noise in row.get("noise", ())]
    known = [cores for cores in noises if cores is not None]
    busy = f"; other processes kept up to {max(known):.2f} cores busy" if known else ""
    return f"Measured on {result['model']} with {result['device']}{busy}."


# Rank of all that is measured: the paper's 8, and its 64 of 4,096 channels in proportion.
RANK = 8
# Hidden size and layers of the Llama whose steps are timed.
SHAPE = (512, 8)
# Of sweeps until memory ends, which take dozens of processes; and where it ends.
SWEEP_SHAPE = (256, 4)
SWEEP_LIMIT_BYTES = 3 * 2**29


def values_of(shape: tuple[int, int]) -> tuple[dict[str, Any], str]:
    """Return the configuration and the name of a small Llama."""
    hidden_size, num_layers = shape
    return llama_values(hidden_size, num_layers), f"Llama {hidden_size}x{num_layers}"


def small_dtype() -> str:
    """Return the type of weights that this processor multiplies fast."""
    from pacatune.precision import bfloat16_is_fast

    return "bfloat16" if bfloat16_is_fast(use_cpu=True) else "float32"


# The model of the paper whose lines small numbers stand beside.
MODEL = "llama3-8b"
_TIME, _KEPT, _PEAK = "small_time", "small_kept", "small_peak"
_MB = 10**6
# In a narrow model a rank weighs more than in the paper's; peaks of a few megabytes are not exact.
_MARGINS = {_TIME: 0.02, _KEPT: 0.05, _PEAK: 0.1}


def bench_columns(table: Table, result: dict[str, Any]) -> list[Column]:
    """Return the columns of what `bench_numbers` gives.

    Args:
        table: The paper's.
        result: Result of a bench cell at the small scale.
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
            about=machine_of(result),
            model=model_of(result),
            rank=small_rank,
        )
        for key, title, unit, paper in titles
    ]


def bench_numbers(
    table: Table, result: dict[str, Any], names: Mapping[str, str]
) -> dict[tuple[str, str], Measured]:
    """Return time, kept bytes and peak of each line that was measured.

    Args:
        table: The paper's.
        result: Result of a bench cell.
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
