"""Table 4 and Figure 3: how long a text, and how many texts, until memory ends."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pacatune.experiments.paper import METHOD_TITLES, fig3
from pacatune.experiments.paper.settings import table_12, table_13
from pacatune.experiments.paper.tables import GPU, TABLE_4, Quantity, Row
from pacatune.experiments.reproduce.charts import lines, stacked
from pacatune.experiments.reproduce.comparison import fill_section
from pacatune.experiments.reproduce.experiment import Cell, Experiment, Mode, Results
from pacatune.experiments.reproduce.section import Chart, Measured, Outcome, Section, Verdict
from pacatune.experiments.reproduce.settings import SettingsBeside, of_bench
from pacatune.experiments.reproduce.simulation import describe, setting_of, simulate_length
from pacatune.experiments.reproduce.steps import (
    RANK,
    bench_cell,
    bench_config,
    machine_of,
    model_of,
    rate_of,
)
from pacatune.experiments.reproduce.verdicts import Column, share_outcome
from pacatune.memory.gpus import gpu_bytes
from pacatune.memory.setting import Setting
from pacatune.reports.tables import ReportTable

__all__ = ["FIGURE_3_EXPERIMENT", "TABLE_4_EXPERIMENT"]


# Table 4: the longest sequence that one A100 trains.


_SIMULATED, _MEASURED = "simulated_length", "measured_length"
_DROPOUT = 0.1
_ABOUT_4 = (
    "How long may one text be before the memory of an NVIDIA A100 (80 GB) is full, for each way of "
    "fine-tuning LLaMA3-8B? Memory grows with every token, by what a method keeps for the backward "
    "pass. LoRA keeps the whole input of every adapted layer, PaCA only the few channels that it "
    "trains.",
    "Here nothing is trained. The step of the real model's code runs on tensors that have sizes "
    "and no memory, and the longest text that surely fits is found by bisection: with the largest "
    "CUDA context and the largest gaps between blocks that `pacatune estimate` allows for.",
)
_NOTES_4 = (
    "The paper leaves open whether LoRA and its relatives had dropout here. Without it every "
    "method comes near the paper's length; with dropout 0.1 they would not (last table).",
    "The paper used transformers 4.43, which kept repeated heads of keys and values; the version "
    "here does not, so that every method reaches some per cent more.",
)
_COLUMN_4 = Column(
    quantity=Quantity(
        key=_SIMULATED,
        title="longest sequence on an A100 (80 GB)",
        unit="tokens",
        kind="length",
        margin=TABLE_4.quantity("length").margin,
    ),
    paper=TABLE_4.quantity("length"),
    is_same=True,
    about="Ours is simulated by `pacatune estimate`.",
)


def _variants() -> dict[str, tuple[Row, Setting, str]]:
    """Return everything that is simulated: name -> the paper's line, the setting, what it is."""
    found = {}
    for row in TABLE_4.rows:
        setting = setting_of(TABLE_4.name, row)
        found[row.key] = (row, setting, "as in the paper")
        if row.method != "paca":
            dropout = setting.but(dropout=_DROPOUT)
            found[f"{row.key}-dropout"] = (row, dropout, f"dropout {_DROPOUT:g}")
        if row.method in ("paca", "lora"):
            lean = setting.but(lean="auto", loss="auto")
            found[f"{row.key}-lean"] = (row, lean, "lean activations (pacatune's default)")
    return found


def _cells_4(mode: Mode) -> list[Cell]:
    """Return the work of a mode."""
    found = [
        Cell(
            key=f"simulate-{name}",
            title=f"simulating {row.title}, {what}: {describe(setting.but(seq_len=512))}",
            methods=(row.method,),
            inputs={**asdict(setting), "gpu": GPU},
            run=partial(_simulate_length, setting),
        )
        for name, (row, setting, what) in _variants().items()
    ]
    if mode != "simulate":
        found.append(bench_cell(_bench_lengths(mode), tuple(TABLE_4.methods())))
    return found


def _bench_lengths(scale: Literal["small", "full"]) -> Any:
    return bench_config(scale, tuple(TABLE_4.methods()), sweep="seq-len", rank=RANK)


def _simulate_length(setting: Setting, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    return simulate_length(setting, gpu_bytes(GPU))


def _section_4(mode: Mode, results: Results) -> Section:
    """Return the report on what there is."""
    part = Section(
        name=TABLE_4.name,
        title=TABLE_4.title,
        place=TABLE_4.place,
        about=list(_ABOUT_4),
        notes=list(_NOTES_4),
    )
    lengths = {
        name: result["max_seq_len"]
        for name in _variants()
        if (result := results.get(f"simulate-{name}")) is not None
    }
    ours = {
        (row.key, _SIMULATED): Measured.exact(lengths[row.key], "simulated")
        for row in TABLE_4.rows
        if row.key in lengths
    }
    columns = [_COLUMN_4]
    bench = results.get("bench")
    if bench is not None:
        columns.append(_measured_column(mode, bench))
        limits = {limit["method"]: limit["limit"] for limit in bench["limits"]}
        ours |= {
            (row.key, _MEASURED): Measured.exact(limits[row.method], "measured")
            for row in TABLE_4.rows
            if row.method in limits
        }
    fill_section(part, TABLE_4, columns, ours)
    rows = [
        [row.title, what, f"{row.values['length']:,.0f}", f"{lengths[name]:,}"]
        for name, (row, _, what) in _variants().items()
        if name in lengths and name != row.key
    ]
    if rows:
        header = ["method", "otherwise than above", "paper, tokens", "ours, tokens"]
        part.tables.append(ReportTable(title="What else changes it", header=header, rows=rows))
    part.numbers["lengths"] = lengths
    return part


def _measured_column(mode: Mode, bench: dict[str, Any]) -> Column:
    paper = TABLE_4.quantity("length")
    is_same = mode == "full"
    return Column(
        quantity=Quantity(
            key=_MEASURED,
            title="longest sequence until memory ends, measured",
            unit="tokens",
            kind="length",
            margin=paper.margin if is_same else 1 / 32,
        ),
        paper=paper,
        is_same=is_same,
        model="" if is_same else model_of(bench),
        about=f"By `pacatune bench --sweep seq-len`, to 1/64 of itself. {machine_of(bench)}",
    )


def _settings_4(scale: Literal["small", "full"]) -> list[SettingsBeside]:
    """Return ours beside the paper's."""
    why = {
        "model": "the longest sequence is simulated for the paper's own model; what is measured "
        "until memory ends is smaller",
        "precision": "what this processor multiplies fast",
        "optimizer": "the paper names none",
    }
    return [
        SettingsBeside(
            title=row.title,
            paper=table_12(row.method),
            ours=of_bench(_bench_lengths(scale), row.method),
            why=why,
        )
        for row in TABLE_4.rows
    ]


TABLE_4_EXPERIMENT = Experiment(
    name=TABLE_4.name,
    title=TABLE_4.title,
    place=TABLE_4.place,
    methods=tuple(TABLE_4.methods()),
    cells=_cells_4,
    section=_section_4,
    settings=_settings_4,
    cannot={},
)


# Figure 3: throughput over the batch.


_NAME_3 = "fig3"
_SEQ_LEN = 512
_ABOUT_3 = (
    "A GPU works best on many texts at once, and memory decides how many that are. The paper "
    "raises the batch until memory ends, on an NVIDIA A100 and on an Intel Gaudi2, and counts "
    "sentences of 512 tokens per second. PaCA keeps less for the backward pass, so its batch can "
    "be larger, and each step is faster as well.",
    "The largest batch on an A100 (80 GB) is simulated here at the paper's own size. Throughput is "
    "measured on the machine named below, with a smaller Llama and less memory where the scale is "
    "small: the shape of the curves and their order can be compared, the numbers cannot.",
)
_NO_SPREAD = (
    "Only the median of each batch was recorded, not the spread of its steps, so nothing can be "
    "said of how sure a ratio of throughputs is."
)
_RULE_3 = (
    "A ratio contradicts the paper if it lies on the other side of 1 (PaCA's batch no larger than "
    "LoRA's, or its best throughput no higher), with its whole interval where it has one."
)


def _setting_3(method: str) -> Setting:
    return Setting(
        model="llama3-8b",
        method=method,
        rank=8,
        seq_len=_SEQ_LEN,
        lean="off",
        loss="logits",
        adapter_dtype="bfloat16",
    )


def _simulate_batch(setting: Setting, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    from pacatune.memory.estimate import find_max

    return {"max_batch": find_max(setting, "batch_size", gpu_bytes(GPU))[0]}


def _bench_batches(scale: Literal["small", "full"]) -> Any:
    return bench_config(scale, fig3.METHODS, sweep="batch", seq_len=_SEQ_LEN, rank=RANK)


def _cells_3(mode: Mode) -> list[Cell]:
    """Return the work of a mode."""
    found = [
        Cell(
            key=f"simulate-{method}",
            title=f"simulating the largest batch of {METHOD_TITLES[method]} on llama3-8b",
            methods=(method,),
            inputs={**asdict(_setting_3(method)), "gpu": GPU},
            run=partial(_simulate_batch, _setting_3(method)),
        )
        for method in fig3.METHODS
    ]
    if mode != "simulate":
        found.append(bench_cell(_bench_batches(mode), fig3.METHODS))
    return found


def _section_3(mode: Mode, results: Results) -> Section:
    """Return the report on what there is."""
    part = Section(name=_NAME_3, title=fig3.TITLE, place=fig3.PLACE, about=list(_ABOUT_3))
    part.tables.append(_papers_table())
    batches = {
        method: result["max_batch"]
        for method in fig3.METHODS
        if (result := results.get(f"simulate-{method}")) is not None
    }
    a100 = fig3.DEVICES["A100"]
    if batches:
        rows = [
            [METHOD_TITLES[method], _authors_batch(method), f"{number:,}"]
            for method, number in batches.items()
        ]
        title = "Largest batch of 512 tokens on an A100 (80 GB), llama3-8b, simulated"
        header = ["method", "authors' raw figures", "simulated"]
        note = f"Authors: {fig3.AUTHORS_SOURCE}."
        part.tables.append(
            ReportTable(title=title, header=header, rows=rows, note=note, align="lr")
        )
        shown = {METHOD_TITLES[method]: [float(number)] for method, number in batches.items()}
        draw = partial(stacked, shown, ("largest batch",), "texts of 512 tokens per step")
        part.charts.append(Chart(caption=title, draw=draw))
        found = {name: Measured.exact(number, "simulated") for name, number in batches.items()}
        _judge(part, "largest batch, simulated", found, a100.batch_ratio)
    bench = results.get("bench")
    if bench is not None:
        _add_sweep(part, bench)
    part.notes.append(_RULE_3)
    part.numbers["largest_batches"] = batches
    return part


def _authors_batch(method: str) -> str:
    """Return the largest batch of the authors' raw figures."""
    return str(max(fig3.AUTHORS_MS[method])) if method in fig3.AUTHORS_MS else "-"


def _papers_table() -> ReportTable:
    rows = [
        [name, f"{d.sentences_per_second:g}", f"{d.rate_ratio:g}", f"{d.batch_ratio:g}"]
        for name, d in fig3.DEVICES.items()
    ]
    header = ["device", "PaCA, sentences/s", "as a multiple of LoRA's", "its batch, of LoRA's"]
    title = "What the paper's text states of PaCA"
    return ReportTable(title=title, header=header, rows=rows, align="lr")


def _add_sweep(part: Section, bench: dict[str, Any]) -> None:
    series = {
        method: [
            (point["num_rows"], rate_of(point))
            for point in bench["points"]
            if point["method"] == method and "step_ms" in point
        ]
        for method in fig3.METHODS
    }
    series = {method: points for method, points in series.items() if points}
    best = {
        method: max((rate for _, rate in points), key=lambda rate: rate.value)
        for method, points in series.items()
    }
    has_spread = any(rate.low < rate.high for points in series.values() for _, rate in points)
    rows = [
        [
            METHOD_TITLES[method],
            f"{max(batch for batch, _ in points):,}",
            f"{best[method].value:.4g}"
            + (f" ({best[method].low:.4g} to {best[method].high:.4g})" if has_spread else ""),
        ]
        for method, points in series.items()
    ]
    spread = "Intervals are the quartiles of the steps." if has_spread else _NO_SPREAD
    part.tables.append(
        ReportTable(
            title=f"{model_of(bench)}, until memory ends, measured",
            header=["method", "largest batch", "sentences/s at best"],
            rows=rows,
            note=f"{machine_of(bench)} {spread}",
            align="lr",
        )
    )
    shown = {METHOD_TITLES[method]: points for method, points in series.items()}
    labels = ("batch, sentences of 512 tokens", f"sentences per second, {model_of(bench)}")
    caption = f"Throughput over the batch. {machine_of(bench)} {spread}"
    part.charts.append(Chart(caption=caption, draw=partial(lines, shown, labels)))
    limits = {
        limit["method"]: Measured.exact(limit["limit"], "measured") for limit in bench["limits"]
    }
    a100 = fig3.DEVICES["A100"]
    on = f"on {model_of(bench)}"
    _judge(part, "largest batch, measured", limits, a100.batch_ratio, on)
    _judge(part, "throughput at its best, measured", best, a100.rate_ratio, on, has_spread)


def _judge(
    part: Section,
    what: str,
    values: dict[str, Measured],
    stated: float,
    on: str = "",
    has_spread: bool = True,
) -> None:
    """Compare PaCA with LoRA.

    Args:
        part: Gets the verdict.
        what: Names the ratio.
        values: Method -> number.
        stated: The paper's ratio, on LLaMA3-8B and an A100.
        on: What ours was measured on, if that is not the paper's model.
        has_spread: Whether the spread of the numbers is known.
    """
    if "paca" not in values or "lora" not in values:
        return
    ours, other = values["paca"], values["lora"]
    if not ours.value or not other.low:
        return
    ratio = Measured(
        value=ours.value / other.value,
        low=ours.low / other.high,
        high=ours.high / other.low,
        origin=ours.origin,
    )
    if not has_spread:
        outcome: Outcome = "cannot_tell"
    elif ratio.low > 1:
        outcome = "agrees"
    elif ratio.high <= 1:
        outcome = "contradicts"
    else:
        outcome = share_outcome(ratio, stated, 0.0)
    here = f"{ratio.value:.2f}"
    if ratio.low < ratio.high:
        here += f" [{ratio.low:.2f}, {ratio.high:.2f}]"
    text = (
        f"{what}: PaCA's is {stated:g} of LoRA's in the paper (A100), {here} here"
        f"{f' {on}' * bool(on)}{'; its spread was not recorded' * (not has_spread)}"
    )
    part.verdicts.append(Verdict(outcome=outcome, origin=ratio.origin, text=text))
    part.numbers.setdefault("ratios", {})[what] = {"paper": stated, "ours": ratio.value}


def _settings_3(scale: Literal["small", "full"]) -> list[SettingsBeside]:
    """Return ours beside the paper's."""
    why = {
        "model": "throughput needs a model that two cores step in a second; the largest batch is "
        "simulated for the paper's own",
        "precision": "what this processor multiplies fast",
        "optimizer": "the paper names none",
    }
    return [
        SettingsBeside(
            title=METHOD_TITLES[method],
            paper=table_13(method),
            ours=of_bench(_bench_batches(scale), method),
            why=why,
        )
        for method in fig3.METHODS
    ]


FIGURE_3_EXPERIMENT = Experiment(
    name=_NAME_3,
    title=fig3.TITLE,
    place=fig3.PLACE,
    methods=fig3.METHODS,
    cells=_cells_3,
    section=_section_3,
    settings=_settings_3,
    cannot={},
)
