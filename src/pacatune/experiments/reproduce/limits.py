"""Table 4 and Figure 3: how long a text, and how many texts, until memory ends."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from pacatune.experiments.reproduce.charts import lines, stacked
from pacatune.experiments.reproduce.comparison import Source, table_experiment
from pacatune.experiments.reproduce.experiment import (
    Cell,
    Chart,
    Experiment,
    Measured,
    Mode,
    Outcome,
    Result,
    Results,
    Scale,
    Section,
    Verdict,
)
from pacatune.experiments.reproduce.settings import SettingsBeside
from pacatune.experiments.reproduce.simulation import (
    describe,
    make_setting,
    setting_of,
    simulate_length,
)
from pacatune.experiments.reproduce.steps import (
    MODEL,
    RANK,
    bench_cell,
    bench_config,
    bench_settings,
    machine_of,
    model_of,
    rate_of,
)
from pacatune.experiments.reproduce.verdicts import Column, Numbers, same_column, share_outcome
from pacatune.measure.device import gpu_bytes
from pacatune.measure.setting import Setting
from pacatune.paper import METHOD_TITLES, fig3
from pacatune.paper.settings import of_line, table_13
from pacatune.paper.tables import GPU, TABLE_4, Row
from pacatune.reports.tables import ReportTable

# Table 4: the longest sequence that one A100 trains.

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


def _sources_4(mode: Mode) -> list[Source]:
    cells = [
        Cell(
            key=f"simulate-{name}",
            title=f"simulating {row.title}, {what}: {describe(setting.but(seq_len=512))}",
            methods=(row.method,),
            inputs={**asdict(setting), "gpu": GPU},
            run=partial(_simulate_length, setting),
        )
        for name, (row, setting, what) in _variants().items()
    ]
    column = same_column(
        TABLE_4.quantity("length"),
        "simulated_length",
        "longest sequence on an A100 (80 GB)",
        "Ours is simulated by `pacatune estimate`.",
    )

    def simulated(results: Results) -> list[tuple[Column, Numbers]]:
        lengths = _lengths(results)
        found = {name: Measured.exact(length, "simulated") for name, length in lengths.items()}
        return [(column, found)]

    found = [Source(cells=cells, columns=simulated)]
    return found if mode == "simulate" else [*found, _sweep_source_4(mode)]


def _simulate_length(setting: Setting, folder: Any, tell: Any) -> Result:
    return simulate_length(setting, gpu_bytes(GPU))


def _lengths(results: Results) -> dict[str, int]:
    """Return the longest text of each variant that has been simulated."""
    return {
        name: result["max_seq_len"]
        for name in _variants()
        if (result := results.get(f"simulate-{name}")) is not None
    }


def _sweep_source_4(scale: Scale) -> Source:
    def columns(results: Results) -> list[tuple[Column, Numbers]]:
        if "bench" not in results:
            return []
        bench = results["bench"]
        column = same_column(
            TABLE_4.quantity("length"),
            "measured_length",
            "longest sequence until memory ends, measured",
            f"By `pacatune bench --sweep seq-len`, to 1/64 of itself. {machine_of(bench)}",
        )
        if scale == "small":
            quantity = replace(column.quantity, margin=1 / 32)
            column = replace(column, quantity=quantity, model=model_of(bench))
        limits = _limits(bench)
        lines = {row.key: limits[row.method] for row in TABLE_4.rows if row.method in limits}
        return [(column, lines)]

    return Source(cells=[bench_cell(_bench_4(scale))], columns=columns)


def _bench_4(scale: Scale) -> Any:
    return bench_config(scale, TABLE_4.methods(), sweep="seq-len")


def _limits(bench: Result) -> dict[str, Measured]:
    """Return the largest size of each method until memory ended."""
    return {one["method"]: Measured.exact(one["limit"], "measured") for one in bench["limits"]}


def _finish_4(part: Section, results: Results) -> None:
    """Add what is otherwise than in the paper."""
    lengths = _lengths(results)
    rows = [
        [row.title, what, f"{row.values['length']:,.0f}", f"{lengths[name]:,}"]
        for name, (row, _, what) in _variants().items()
        if name in lengths and name != row.key
    ]
    if rows:
        header = ["method", "otherwise than above", "paper, tokens", "ours, tokens"]
        part.tables.append(ReportTable(title="What else changes it", header=header, rows=rows))
    part.numbers["lengths"] = lengths


def _settings_4(scale: Scale) -> list[SettingsBeside]:
    stated = {row.method: (row.title, of_line(TABLE_4.name, row)) for row in TABLE_4.rows}
    why = {
        "model": "the longest sequence is simulated for the paper's own model; what is measured "
        "until memory ends is smaller"
    }
    return bench_settings(_bench_4(scale), stated, why)


TABLE_4_EXPERIMENT = table_experiment(
    TABLE_4, _ABOUT_4, _sources_4, _settings_4, notes=_NOTES_4, finish=_finish_4
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


def _bench_3(scale: Scale) -> Any:
    return bench_config(scale, fig3.METHODS, sweep="batch", seq_len=_SEQ_LEN)


def _cells_3(mode: Mode) -> list[Cell]:
    settings = {m: make_setting(MODEL, m, rank=RANK, seq_len=_SEQ_LEN) for m in fig3.METHODS}
    found = [
        Cell(
            key=f"simulate-{method}",
            title=f"simulating the largest batch of {METHOD_TITLES[method]} on {MODEL}",
            methods=(method,),
            inputs={**asdict(setting), "gpu": GPU},
            run=partial(_simulate_batch, setting),
        )
        for method, setting in settings.items()
    ]
    return found if mode == "simulate" else [*found, bench_cell(_bench_3(mode))]


def _simulate_batch(setting: Setting, folder: Any, tell: Any) -> Result:
    from pacatune.measure.estimate import find_max

    return {"max_batch": find_max(setting, "batch_size", gpu_bytes(GPU))[0]}


def _section_3(mode: Mode, results: Results) -> Section:
    part = Section(name=_NAME_3, title=fig3.TITLE, place=fig3.PLACE, about=list(_ABOUT_3))
    part.tables.append(_papers_table())
    batches = {
        method: result["max_batch"]
        for method in fig3.METHODS
        if (result := results.get(f"simulate-{method}")) is not None
    }
    if batches:
        _add_batches(part, batches)
    if "bench" in results:
        _add_sweep(part, results["bench"])
    part.notes.append(_RULE_3)
    part.numbers["largest_batches"] = batches
    return part


def _papers_table() -> ReportTable:
    rows = [
        [name, f"{d.sentences_per_second:g}", f"{d.rate_ratio:g}", f"{d.batch_ratio:g}"]
        for name, d in fig3.DEVICES.items()
    ]
    header = ["device", "PaCA, sentences/s", "as a multiple of LoRA's", "its batch, of LoRA's"]
    title = "What the paper's text states of PaCA"
    return ReportTable(title=title, header=header, rows=rows, align="lr")


def _add_batches(part: Section, batches: Mapping[str, int]) -> None:
    authors = {method: str(max(times)) for method, times in fig3.AUTHORS_MS.items()}
    title = f"Largest batch of 512 tokens on an A100 (80 GB), {MODEL}, simulated"
    part.tables.append(
        ReportTable(
            title=title,
            header=["method", "authors' raw figures", "simulated"],
            rows=[[METHOD_TITLES[m], authors.get(m, "-"), f"{n:,}"] for m, n in batches.items()],
            note=f"Authors: {fig3.AUTHORS_SOURCE}.",
            align="lr",
        )
    )
    shown = {METHOD_TITLES[method]: [float(number)] for method, number in batches.items()}
    draw = partial(stacked, shown, ("largest batch",), "texts of 512 tokens per step")
    part.charts.append(Chart(caption=title, draw=draw))
    found = {method: Measured.exact(number, "simulated") for method, number in batches.items()}
    _judge(part, "largest batch, simulated", found, fig3.DEVICES["A100"].batch_ratio)


def _add_sweep(part: Section, bench: Result) -> None:
    series: dict[str, list[tuple[float, Measured]]] = {method: [] for method in fig3.METHODS}
    for point in bench["points"]:
        if point["method"] in series and "step_ms" in point:
            series[point["method"]].append((point["num_rows"], rate_of(point)))
    series = {method: points for method, points in series.items() if points}
    best = {
        method: max((rate for _, rate in points), key=lambda rate: rate.value)
        for method, points in series.items()
    }
    has_spread = any(rate.low < rate.high for points in series.values() for _, rate in points)
    spread = "Intervals are the quartiles of the steps." if has_spread else _NO_SPREAD
    rows = [
        [
            METHOD_TITLES[method],
            f"{max(batch for batch, _ in points):,}",
            best[method].text("{:.4g}".format, " ({} to {})"),
        ]
        for method, points in series.items()
    ]
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
    a100, on = fig3.DEVICES["A100"], f" on {model_of(bench)}"
    _judge(part, "largest batch, measured", _limits(bench), a100.batch_ratio, on)
    what = "throughput at its best, measured"
    _judge(part, what, best, a100.rate_ratio, on, has_spread=has_spread)


def _judge(
    part: Section,
    what: str,
    values: Mapping[str, Measured],
    stated: float,
    on: str = "",
    *,
    has_spread: bool = True,
) -> None:
    """Compare PaCA's share of LoRA's with the paper's, on LLaMA3-8B and an A100."""
    if "paca" not in values or "lora" not in values:
        return
    if not values["paca"].value or not values["lora"].low:
        return
    ratio = values["paca"].over(values["lora"])
    if not has_spread:
        outcome: Outcome = "cannot_tell"
    elif ratio.low > 1:
        outcome = "agrees"
    elif ratio.high <= 1:
        outcome = "contradicts"
    else:
        outcome = share_outcome(ratio, stated, 0.0)
    unsure = "" if has_spread else "; its spread was not recorded"
    text = (
        f"{what}: PaCA's is {stated:g} of LoRA's in the paper (A100), "
        f"{ratio.text('{:.2f}'.format)} here{on}{unsure}"
    )
    part.verdicts.append(Verdict(outcome=outcome, origin=ratio.origin, text=text))
    part.numbers.setdefault("ratios", {})[what] = {"paper": stated, "ours": ratio.value}


def _settings_3(scale: Scale) -> list[SettingsBeside]:
    stated = {method: (METHOD_TITLES[method], table_13(method)) for method in fig3.METHODS}
    why = {
        "model": "throughput needs a model that two cores step in a second; the largest batch is "
        "simulated for the paper's own"
    }
    return bench_settings(_bench_3(scale), stated, why)


FIGURE_3_EXPERIMENT = Experiment(
    name=_NAME_3,
    title=fig3.TITLE,
    place=fig3.PLACE,
    methods=fig3.METHODS,
    cells=_cells_3,
    section=_section_3,
    settings=_settings_3,
)
