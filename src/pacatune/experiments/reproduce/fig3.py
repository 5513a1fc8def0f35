"""Figure 3: throughput over the batch, until memory ends."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pacatune.experiments.paper import METHOD_TITLES, fig3
from pacatune.experiments.paper.settings import table_13
from pacatune.experiments.paper.tables import GPU
from pacatune.experiments.reproduce.bench_cells import bench_cell, bench_config, machine_of
from pacatune.experiments.reproduce.cells import Cell
from pacatune.experiments.reproduce.charts import lines, stacked
from pacatune.experiments.reproduce.compare import Verdict
from pacatune.experiments.reproduce.experiment import Experiment, Mode, Results, SettingsBeside
from pacatune.experiments.reproduce.section import Chart, Section
from pacatune.experiments.reproduce.settings_of import of_bench
from pacatune.memory.gpus import gpu_bytes
from pacatune.memory.setting import Setting
from pacatune.reports.tables import ReportTable

__all__ = ["EXPERIMENT"]

NAME = "fig3"
_SEQ_LEN = 512
_ABOUT = (
    "A GPU works best on many texts at once, and memory decides how many that are. The paper "
    "raises the batch until memory ends, on an NVIDIA A100 and on an Intel Gaudi2, and counts "
    "sentences of 512 tokens per second. PaCA keeps less for the backward pass, so its batch can "
    "be larger, and each step is faster as well.",
    "The largest batch on an A100 (80 GB) is simulated here at the paper's own size. Throughput is "
    "measured on the machine named below, with a smaller Llama and less memory where the scale is "
    "small: the shape of the curves and their order can be compared, the numbers cannot.",
)
_RULE = (
    "A ratio contradicts the paper if it lies on the other side of 1 (PaCA's batch no larger than "
    "LoRA's, or its best throughput no higher)."
)


def _setting(method: str) -> Setting:
    return Setting(
        model="llama3-8b",
        method=method,
        rank=8,
        seq_len=_SEQ_LEN,
        lean="off",
        loss="logits",
        adapter_dtype="bfloat16",
    )


def _simulate(setting: Setting, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    from pacatune.memory.estimate import find_max

    return {"max_batch": find_max(setting, "batch_size", gpu_bytes(GPU))[0]}


def _bench(scale: Literal["small", "full"]) -> Any:
    return bench_config(scale, fig3.METHODS, sweep="batch", seq_len=_SEQ_LEN, rank=8)


def cells(mode: Mode) -> list[Cell]:
    """Return the work of a mode."""
    found = [
        Cell(
            key=f"simulate-{method}",
            title=f"simulating the largest batch of {METHOD_TITLES[method]} on llama3-8b",
            methods=(method,),
            inputs={**asdict(_setting(method)), "gpu": GPU},
            run=partial(_simulate, _setting(method)),
        )
        for method in fig3.METHODS
    ]
    if mode != "simulate":
        found.append(bench_cell(_bench(mode), fig3.METHODS))
    return found


def section(mode: Mode, results: Results) -> Section:
    """Return the report on what there is."""
    part = Section(name=NAME, title=fig3.TITLE, place=fig3.PLACE, about=list(_ABOUT))
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
        part.tables.append(ReportTable(title=title, header=header, rows=rows, note=note))
        shown = {METHOD_TITLES[method]: [float(number)] for method, number in batches.items()}
        draw = partial(stacked, shown, ("largest batch",), "texts of 512 tokens per step")
        part.charts.append(Chart(caption=title, draw=draw))
        _judge(part, "largest batch, simulated", batches, a100.batch_ratio)
    bench = results.get("bench")
    if bench is not None:
        _add_sweep(part, bench)
    part.notes.append(_RULE)
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
    return ReportTable(title="What the paper's text states of PaCA", header=header, rows=rows)


def _add_sweep(part: Section, bench: dict[str, Any]) -> None:
    points = [point for point in bench["points"] if "step_ms" in point]
    series = {
        METHOD_TITLES[method]: [
            (point["num_rows"], point["sentences_per_second"])
            for point in points
            if point["method"] == method
        ]
        for method in fig3.METHODS
    }
    series = {name: values for name, values in series.items() if values}
    best = {name: max(rate for _, rate in values) for name, values in series.items()}
    rows = [
        [name, f"{max(batch for batch, _ in values):,}", f"{best[name]:.4g}"]
        for name, values in series.items()
    ]
    header = ["method", "largest batch", "sentences/s at best"]
    part.tables.append(
        ReportTable(
            title="Until memory ends, measured", header=header, rows=rows, note=machine_of(bench)
        )
    )
    draw = partial(lines, series, ("batch, sentences of 512 tokens", "sentences per second"))
    part.charts.append(Chart(caption=f"Throughput over the batch. {machine_of(bench)}", draw=draw))
    limits = {limit["method"]: limit["limit"] for limit in bench["limits"]}
    a100 = fig3.DEVICES["A100"]
    _judge(part, "largest batch, measured", limits, a100.batch_ratio)
    named = {method: best.get(METHOD_TITLES[method]) for method in fig3.METHODS}
    rates = {method: rate for method, rate in named.items() if rate is not None}
    _judge(part, "throughput at its best, measured", rates, a100.rate_ratio)


def _judge(part: Section, what: str, values: dict[str, Any], stated: float) -> None:
    """Compare PaCA with LoRA."""
    if not values.get("paca") or not values.get("lora"):
        return
    ratio = values["paca"] / values["lora"]
    text = f"{what}: PaCA's is {stated:g} of LoRA's in the paper (A100), {ratio:.2f} here"
    outcome = "agrees" if ratio > 1 else "contradicts"
    part.verdicts.append(Verdict(outcome=outcome, text=text))  # type: ignore[arg-type]
    part.numbers.setdefault("ratios", {})[what] = {"paper": stated, "ours": ratio}


def settings(scale: Literal["small", "full"]) -> list[SettingsBeside]:
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
            ours=of_bench(_bench(scale), method),
            why=why,
        )
        for method in fig3.METHODS
    ]


EXPERIMENT = Experiment(
    name=NAME,
    title=fig3.TITLE,
    place=fig3.PLACE,
    methods=fig3.METHODS,
    cells=cells,
    section=section,
    settings=settings,
    cannot={},
)
