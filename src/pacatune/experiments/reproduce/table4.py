"""Table 4: the longest sequence that one A100 trains."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pacatune.experiments.paper.settings import table_12
from pacatune.experiments.paper.tables import GPU, TABLE_4, Quantity, Row
from pacatune.experiments.reproduce.bench_cells import bench_cell, bench_config, machine_of
from pacatune.experiments.reproduce.beside import fill_section
from pacatune.experiments.reproduce.cells import Cell
from pacatune.experiments.reproduce.compare import Column
from pacatune.experiments.reproduce.experiment import Experiment, Mode, Results, SettingsBeside
from pacatune.experiments.reproduce.measured import Measured
from pacatune.experiments.reproduce.section import Section
from pacatune.experiments.reproduce.settings_of import of_bench
from pacatune.experiments.reproduce.simulate import describe, setting_of, simulate_length
from pacatune.memory.gpus import gpu_bytes
from pacatune.memory.setting import Setting
from pacatune.reports.tables import ReportTable

__all__ = ["EXPERIMENT"]

_KEY, _MEASURED = "simulated_length", "measured_length"
_DROPOUT = 0.1
_ABOUT = (
    "How long may one text be before the memory of an NVIDIA A100 (80 GB) is full, for each way of "
    "fine-tuning LLaMA3-8B? Memory grows with every token, by what a method keeps for the backward "
    "pass. LoRA keeps the whole input of every adapted layer, PaCA only the few channels that it "
    "trains.",
    "Here nothing is trained. The step of the real model's code runs on tensors that have sizes "
    "and no memory, and the longest text that surely fits is found by bisection: with the largest "
    "CUDA context and the largest gaps between blocks that `pacatune estimate` allows for.",
)
_NOTES = (
    "The paper leaves open whether LoRA and its relatives had dropout here. Without it every "
    "method comes near the paper's length; with dropout 0.1 they would not (last table).",
    "The paper used transformers 4.43, which kept repeated heads of keys and values; the version "
    "here does not, so that every method reaches some per cent more.",
)
_COLUMN = Column(
    quantity=Quantity(
        key=_KEY,
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


def cells(mode: Mode) -> list[Cell]:
    """Return the work of a mode."""
    found = [
        Cell(
            key=f"simulate-{name}",
            title=f"simulating {row.title}, {what}: {describe(setting.but(seq_len=512))}",
            methods=(row.method,),
            inputs={**asdict(setting), "gpu": GPU},
            run=partial(_simulate, setting),
        )
        for name, (row, setting, what) in _variants().items()
    ]
    if mode != "simulate":
        found.append(bench_cell(_bench(mode), tuple(TABLE_4.methods())))
    return found


def _bench(scale: Literal["small", "full"]) -> Any:
    return bench_config(scale, tuple(TABLE_4.methods()), sweep="seq-len", rank=8)


def _simulate(setting: Setting, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    return simulate_length(setting, gpu_bytes(GPU))


def section(mode: Mode, results: Results) -> Section:
    """Return the report on what there is."""
    part = Section(
        name=TABLE_4.name,
        title=TABLE_4.title,
        place=TABLE_4.place,
        about=list(_ABOUT),
        notes=list(_NOTES),
    )
    lengths = {
        name: result["max_seq_len"]
        for name in _variants()
        if (result := results.get(f"simulate-{name}")) is not None
    }
    ours = {
        (row.key, _KEY): Measured.exact(lengths[row.key], "simulated")
        for row in TABLE_4.rows
        if row.key in lengths
    }
    columns = [_COLUMN]
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
        about=f"By `pacatune bench --sweep seq-len`, to 1/64 of itself. {machine_of(bench)}",
    )


def settings(scale: Literal["small", "full"]) -> list[SettingsBeside]:
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
            ours=of_bench(_bench(scale), row.method),
            why=why,
        )
        for row in TABLE_4.rows
    ]


EXPERIMENT = Experiment(
    name=TABLE_4.name,
    title=TABLE_4.title,
    place=TABLE_4.place,
    methods=tuple(TABLE_4.methods()),
    cells=cells,
    section=section,
    settings=settings,
    cannot={},
)
