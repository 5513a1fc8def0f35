"""Figure 2: operations and time of a step of full fine-tuning, LoRA and PaCA."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pacatune.experiments.reproduce.charts import stacked
from pacatune.experiments.reproduce.experiment import (
    Cell,
    Chart,
    Experiment,
    Measured,
    Mode,
    Result,
    Results,
    Scale,
    Section,
)
from pacatune.experiments.reproduce.settings import SettingsBeside
from pacatune.experiments.reproduce.simulation import make_setting
from pacatune.experiments.reproduce.steps import (
    MODEL,
    RANK,
    bench_cell,
    bench_config,
    bench_settings,
    machine_of,
    model_of,
    phase_ratio,
    row_of,
)
from pacatune.experiments.reproduce.verdicts import claims_table, judge_claim
from pacatune.paper import METHOD_TITLES, fig2
from pacatune.paper.settings import table_8
from pacatune.reports.tables import ReportTable

_NAME = "fig2"
_TOKENS, _ROWS = 512, 2
_PHASES = ("forward", "backward")
_ABOUT = (
    "What does one training step cost? The paper counts the operations (additions and "
    "multiplications) of the forward pass, which computes the loss, and of the backward pass, "
    "which computes what must change, for full fine-tuning, LoRA and PaCA; and it measures their "
    "times. LoRA computes a third less than full fine-tuning and yet takes as long, since its "
    "small matrices are steps of their own in every layer. PaCA has no such steps.",
    "Operations are counted here at the paper's own size, 2 x 512 tokens of LLaMA3-8B: the code of "
    "the step runs on tensors without memory, and every product is counted. That is exact. Times "
    "are those of a smaller Llama where the scale is small: shares of one another, on another "
    "machine, need not be the paper's.",
)


def _bench(scale: Scale) -> Any:
    return bench_config(scale, fig2.METHODS, tokens=(_ROWS * _TOKENS,), seq_len=_TOKENS)


def _cells(mode: Mode) -> list[Cell]:
    found = [
        Cell(
            key=f"operations-{method}",
            title=f"counting the operations of {METHOD_TITLES[method]} on {MODEL}",
            methods=(method,),
            inputs={"model": MODEL, "method": method, "rank": RANK, "tokens": [_ROWS, _TOKENS]},
            run=partial(_count, method),
        )
        for method in fig2.METHODS
    ]
    return found if mode == "simulate" else [*found, bench_cell(_bench(mode))]


def _count(method: str, folder: Path, tell: Any) -> Result:
    from pacatune.measure.simulate import FakeTraining

    setting = make_setting(MODEL, method, rank=RANK, batch_size=_ROWS, seq_len=_TOKENS)
    return FakeTraining(setting).count_operations(_ROWS, _TOKENS)


def _section(mode: Mode, results: Results) -> Section:
    part = Section(name=_NAME, title=fig2.TITLE, place=fig2.PLACE, about=list(_ABOUT))
    operations = {
        method: {phase: result[f"{phase}_flops"] for phase in _PHASES}
        for method in fig2.METHODS
        if (result := results.get(f"operations-{method}")) is not None
    }
    if operations:
        tera = {m: [counts[phase] / 1e12 for phase in _PHASES] for m, counts in operations.items()}
        _add_phases(
            part,
            {method: [*parts, sum(parts)] for method, parts in tera.items()},
            [*_PHASES, "both"],
            show="{:.2f}".format,
            title=f"Operations of a step of {MODEL}, TFLOP (counted)",
            unit="TFLOP per step",
            caption="Operations of a step, counted exactly",
        )
    bench = results.get("bench")
    if bench is not None:
        phases = [*_PHASES, "optimizer", "step"]
        rows = {method: row_of(bench, method) for method in fig2.METHODS}
        _add_phases(
            part,
            {m: [row[f"{phase}_ms"] for phase in phases] for m, row in rows.items() if row},
            phases,
            show="{:.4g}".format,
            title=f"Time of a step of {model_of(bench)}, ms (medians)",
            unit="ms per step",
            caption=f"Times of a step of {model_of(bench)}. {machine_of(bench)}",
            note=machine_of(bench),
        )
    found = [
        (claim, ours)
        for claim in fig2.CLAIMS
        if (ours := _ours(claim, operations, bench)) is not None
    ]
    if found:
        part.tables.append(claims_table(found))
        part.verdicts += [judge_claim(*one) for one in found]
    part.numbers["claims"] = {
        claim.key: {"paper": claim.ratio, "ours": asdict(ours)} for claim, ours in found
    }
    return part


def _add_phases(
    part: Section,
    values: dict[str, list[float]],
    names: list[str],
    *,
    show: Callable[[float], str],
    title: str,
    unit: str,
    caption: str,
    note: str = "",
) -> None:
    """Add a table of each method's phases and their sum, the last, and a picture of the phases."""
    named = {METHOD_TITLES[method]: numbers for method, numbers in values.items()}
    rows = [[name, *map(show, numbers)] for name, numbers in named.items()]
    header = ["method", *names]
    part.tables.append(ReportTable(title=title, header=header, rows=rows, note=note, align="lr"))
    if named:
        parts = {name: numbers[:-1] for name, numbers in named.items()}
        part.charts.append(Chart(caption=caption, draw=partial(stacked, parts, names[:-1], unit)))


def _ours(
    claim: fig2.Claim, operations: dict[str, dict[str, int]], bench: Result | None
) -> Measured | None:
    if claim.quantity == "time":
        return None if bench is None else phase_ratio(bench, claim.what, claim.of)
    if not {claim.what[0], claim.of[0]} <= operations.keys():
        return None
    what, of = (
        sum(operations[method].values()) if phase == "step" else operations[method][phase]
        for method, phase in (claim.what, claim.of)
    )
    return Measured.exact(what / of, "counted")


def _settings(scale: Scale) -> list[SettingsBeside]:
    stated = {method: (METHOD_TITLES[method], table_8(method)) for method in fig2.METHODS}
    why = {
        "model": "operations are counted at the paper's size; times need a model that two cores "
        "step in a second",
        "optimizer": "the paper names none; it is timed, and its operations are not counted",
    }
    return bench_settings(_bench(scale), stated, why)


FIGURE_2_EXPERIMENT = Experiment(
    name=_NAME,
    title=fig2.TITLE,
    place=fig2.PLACE,
    methods=fig2.METHODS,
    cells=_cells,
    section=_section,
    settings=_settings,
)
