"""Cells that `pacatune bench` measures: steps of all methods in turns, or sweeps."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pacatune.experiments.reproduce.comparison import Source
from pacatune.experiments.reproduce.experiment import Cell, Measured, Results, Scale
from pacatune.experiments.reproduce.settings import SettingsBeside, of_bench
from pacatune.experiments.reproduce.verdicts import Column, Numbers
from pacatune.measure.models import llama_values, load_values
from pacatune.measure.setting import BenchConfig
from pacatune.paper.settings import Settings
from pacatune.paper.tables import Quantity, Row, Table
from pacatune.reports import rows
from pacatune.reports.rows import Finished, done

# The model of the paper whose lines small numbers stand beside.
MODEL = "llama3-8b"
# Rank of all that is measured: the paper's 8, and its 64 of 4,096 channels in proportion.
RANK = 8
# Hidden size and layers of the Llama whose steps are timed.
SHAPE = (512, 8)
# Of sweeps until memory ends, which take dozens of processes; and where it ends.
SWEEP_SHAPE = (256, 4)
SWEEP_LIMIT_BYTES = 3 * 2**29
_MB = 10**6


def bench_config(scale: Scale, methods: Sequence[str], **options: Any) -> BenchConfig:
    """Return what is measured at a scale: a small Llama here, LLaMA3-8B on an accelerator."""
    options |= {"methods": tuple(methods), "rank": RANK}
    if scale == "full":
        return BenchConfig(
            values=load_values(MODEL), title=MODEL, **{"dtype": "bfloat16"} | options
        )
    small: dict[str, Any] = {"device": "cpu"}
    if options.get("sweep") is not None:
        small |= {"memory_limit": SWEEP_LIMIT_BYTES, "seconds": 1.0}
    hidden_size, num_layers = SHAPE if options.get("sweep") is None else SWEEP_SHAPE
    return BenchConfig(
        values=llama_values(hidden_size, num_layers),
        title=f"Llama {hidden_size}x{num_layers}",
        **small | options,
    )


def small_dtype() -> str:
    """Return the type of weights that this processor multiplies fast."""
    from pacatune.precision import bfloat16_is_fast

    return "bfloat16" if bfloat16_is_fast(use_cpu=True) else "float32"


def bench_cell(config: BenchConfig) -> Cell:
    """Return the cell of one run of `pacatune bench`."""

    def measure(folder: Path, tell: Any) -> dict[str, Any]:
        from pacatune.measure.bench import describe, device_text, make_jobs, result_folder

        output = result_folder(folder)
        with output.going_on("jobs"):
            found = [*done(make_jobs(config), output, tell=tell).values()]
        if failed := [one.error for one in found if one.error and "MemoryError" not in one.error]:
            raise RuntimeError(failed[0])
        names = {"model": describe(config), "device": device_text(config)}
        return names | _result([row for one in found for row in one.rows], found)

    what = f"a sweep over {config.sweep}" if config.sweep else "steps of"
    return Cell(
        key="bench",
        title=f"measuring {what} {config.title}: {', '.join(config.methods)}",
        methods=config.methods,
        inputs=asdict(config),
        run=measure,
    )


def _result(measured: list[rows.Row], jobs: list[Finished]) -> dict[str, Any]:
    """Return rows as the results that are committed have them."""
    cores = max((one.provenance["noise"]["num_cores_of_others"] for one in jobs), default=0.0)
    names = {"peak": "peak_bytes", "kept for backward": "saved_bytes"}
    names["throughput"] = "sentences_per_second"
    found: dict[tuple[str, str], dict[str, Any]] = {}
    ratios: dict[str, dict[str, Any]] = {}
    for row in measured:
        if row.unit == "ratio":
            spread = {"ratio": row.value, "low": row.low, "high": row.high}
            pair = ratios.setdefault(row.method, {})
            pair |= spread if row.what == "step" else {row.what: spread}
        elif row.what not in ("largest batch", "longest sequence"):
            one = found.setdefault(
                (row.method, row.setting), {"status": "measured", "peak_bytes": None}
            )
            one |= {"method": row.method, "noise": [{"num_cores_of_others": cores}]}
            one["num_rows"] = int(row.setting.partition(" ")[0])
            if row.unit == "ms":
                ends = {"": row.value, "_quartile_1": row.low, "_quartile_3": row.high}
                one |= {f"{row.what}_ms{end}": value for end, value in ends.items()}
            else:
                one[names.get(row.what, row.what)] = row.value
    limits = [r for r in measured if r.what in ("largest batch", "longest sequence")]
    if limits:
        shown = [{"method": row.method, "limit": int(row.value)} for row in limits]
        return {"points": [*found.values()], "limits": shown}
    parts = [dict(zip(("method", "reference"), name.split(" / "), strict=True)) for name in ratios]
    pairs = [one | ratio for one, ratio in zip(parts, ratios.values(), strict=True)]
    return {"rows": [*found.values()], "ratios": pairs}


def bench_settings(
    config: BenchConfig, stated: dict[str, tuple[str, Settings]], why: dict[str, str]
) -> list[SettingsBeside]:
    """Return what is measured of each method beside the title and settings of its line."""
    common = {
        "precision": "what this processor multiplies fast",
        "optimizer": "the paper names none",
    }
    return [
        SettingsBeside(title=title, paper=paper, ours=of_bench(config, method), why=common | why)
        for method, (title, paper) in stated.items()
    ]


def row_of(result: dict[str, Any], method: str) -> dict[str, Any]:
    """Return the row of a method in the only setting; empty where memory ended."""
    rows = [row for row in result["rows"] if row["method"] == method]
    return rows[0] if rows and rows[0]["status"] == "measured" else {}


def steps_of_ours(result: dict[str, Any]) -> dict[str, Measured]:
    """Return each method's step as a multiple of ours, by the pairs that took turns.

    Ours is 1 by definition; the others have 95 % bootstrap intervals.
    """
    one = Measured.exact(1.0, "measured")
    found = {}
    for ratio in result["ratios"]:
        found[ratio["method"]] = one
        found[ratio["reference"]] = one.over(_ratio(ratio, "step"))
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
    """Return the time of a method's phase as a share of another's; None if not measured.

    Pairs that took turns have a bootstrap interval, others one by their quartiles.
    """
    pairs = {(pair["method"], pair["reference"]): pair for pair in result["ratios"]}
    first = next(iter(pairs), ("", ""))[0]
    if what[1] == of[1] and (what[0], of[0]) in pairs:
        return _ratio(pairs[what[0], of[0]], what[1])
    if what[1] == of[1] and {(first, what[0]), (first, of[0])} <= set(pairs):
        # Both took turns with the same third one, maybe at different times.
        above, below = (_ratio(pairs[first, one[0]], one[1]) for one in (of, what))
        return above.over(below)
    times = [_time(row_of(result, method), phase) for method, phase in (what, of)]
    return None if times[0] is None or times[1] is None else times[0].over(times[1])


def _time(row: dict[str, Any], phase: str) -> Measured | None:
    if "step_ms" not in row:
        return None
    low, high = (row[f"{phase}_ms_quartile_{number}"] for number in (1, 3))
    return Measured(value=row[f"{phase}_ms"], low=low, high=high, origin="measured")


def _ratio(pair: dict[str, Any], phase: str) -> Measured:
    values = pair if phase == "step" else pair[phase]
    return Measured(
        value=values["ratio"], low=values["low"], high=values["high"], origin="measured"
    )


def model_of(result: dict[str, Any]) -> str:
    """Return the name of the model that was measured."""
    return str(result["model"]).partition(",")[0]


def machine_of(result: dict[str, Any]) -> str:
    """Return what was measured where, and what else the machine did, in a sentence."""
    timed = [*result.get("rows", ()), *result.get("points", ())]
    noises = [noise["num_cores_of_others"] for row in timed for noise in row.get("noise", ())]
    known = [cores for cores in noises if cores is not None]
    busy = f"; other processes kept up to {max(known):.2f} cores busy" if known else ""
    return f"Measured on {result['model']} with {result['device']}{busy}."


def small_rank(row: Row) -> int | None:
    """Return the rank of what is measured at the small scale, whatever the paper's."""
    return RANK if row.is_trained and row.method != "full" else None


def steps_source(table: Table, *, tokens: int, seq_len: int, note: str = "") -> Source:
    """Return time, kept bytes and peak of a small Llama beside the paper's time and memory."""

    def columns(results: Results) -> list[tuple[Column, Numbers]]:
        if "bench" not in results:
            return []
        bench = results["bench"]
        times = steps_of_ours(bench)
        time, kept, peak = {}, {}, {}
        for method in table.trained_methods:
            row = row_of(bench, method)
            # The first line of a method is that of the smallest rank.
            lines = [r.key for r in table.rows if (r.model, r.method) == (MODEL, method)]
            if not row or not lines:
                continue
            if method in times:
                time[lines[0]] = times[method]
            kept[lines[0]] = Measured.exact(row["saved_bytes"] / _MB, "counted")
            if row["peak_bytes"] is not None:
                peak[lines[0]] = Measured.exact(row["peak_bytes"] / _MB, "measured")

        def column(paper: str, quantity: Quantity) -> Column:
            return Column(
                quantity=quantity,
                paper=table.quantity(paper),
                about=machine_of(bench),
                model=model_of(bench),
                rank=small_rank,
            )

        # In a narrow model a rank weighs more than in the paper's; peaks of a few megabytes are
        # not exact.
        step = Quantity("small_time", "time of a step, small model", "of PaCA's", "time", 0.02)
        held = Quantity("small_kept", "kept for backward, small model", "MB", "memory", 0.05)
        most = Quantity("small_peak", "peak of a process, small model", "MB", "memory", 0.1)
        return [
            (column("time", step), time),
            (column("memory", held), kept),
            (column("memory", most), peak),
        ]

    config = bench_config("small", table.trained_methods, tokens=(tokens,), seq_len=seq_len)
    return Source(cells=[bench_cell(config)], columns=columns, note=note)
