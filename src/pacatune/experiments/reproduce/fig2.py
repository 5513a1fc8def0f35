"""Figure 2: operations and time of a step of full fine-tuning, LoRA and PaCA."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pacatune.experiments.reproduce.charts import stacked
from pacatune.experiments.reproduce.experiment import Cell, Experiment, Mode, Results
from pacatune.experiments.reproduce.section import Chart, Measured, Section
from pacatune.experiments.reproduce.settings import SettingsBeside, of_bench
from pacatune.experiments.reproduce.steps import (
    RANK,
    bench_cell,
    bench_config,
    machine_of,
    model_of,
    phase_ratio,
    row_of,
)
from pacatune.experiments.reproduce.verdicts import ClaimResult, claims_table, judge_claim
from pacatune.measure.setting import Setting
from pacatune.paper import METHOD_TITLES, fig2
from pacatune.paper.settings import table_8
from pacatune.reports.tables import ReportTable

__all__ = ["FIGURE_2_EXPERIMENT"]

NAME = "fig2"
_MODEL = "llama3-8b"
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


def _setting(method: str) -> Setting:
    return Setting(
        model=_MODEL,
        method=method,
        rank=8,
        batch_size=_ROWS,
        seq_len=_TOKENS,
        lean="off",
        loss="logits",
        adapter_dtype="bfloat16",
    )


def _count(setting: Setting, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    from pacatune.measure.simulate import FakeTraining

    return FakeTraining(setting).count_operations(setting.batch_size, setting.seq_len)


def _bench(scale: Literal["small", "full"]) -> Any:
    return bench_config(scale, fig2.METHODS, tokens=(_ROWS * _TOKENS,), seq_len=_TOKENS, rank=RANK)


def cells(mode: Mode) -> list[Cell]:
    """Return the work of a mode."""
    found = [
        Cell(
            key=f"operations-{method}",
            title=f"counting the operations of {METHOD_TITLES[method]} on {_MODEL}",
            methods=(method,),
            inputs={"model": _MODEL, "method": method, "rank": 8, "tokens": [_ROWS, _TOKENS]},
            run=partial(_count, _setting(method)),
        )
        for method in fig2.METHODS
    ]
    if mode != "simulate":
        found.append(bench_cell(_bench(mode), fig2.METHODS))
    return found


def section(mode: Mode, results: Results) -> Section:
    """Return the report on what there is."""
    part = Section(name=NAME, title=fig2.TITLE, place=fig2.PLACE, about=list(_ABOUT))
    operations = {
        method: result
        for method in fig2.METHODS
        if (result := results.get(f"operations-{method}")) is not None
    }
    if operations:
        _add_operations(part, operations)
    bench = results.get("bench")
    if bench is not None:
        _add_times(part, bench)
    found = [
        ClaimResult(claim=claim, ours=ours)
        for claim in fig2.CLAIMS
        if (ours := _ours(claim, operations, bench)) is not None
    ]
    if found:
        part.tables.append(claims_table(found))
        part.verdicts += [judge_claim(one) for one in found]
    part.numbers["claims"] = {
        one.claim.key: {"paper": one.claim.ratio, "ours": one.ours.to_dict()} for one in found
    }
    return part


def _add_operations(part: Section, operations: dict[str, dict[str, Any]]) -> None:
    rows = []
    for method, counts in operations.items():
        forward, backward = (counts[f"{phase}_flops"] / 1e12 for phase in _PHASES)
        rows.append(
            [METHOD_TITLES[method], *(f"{n:.2f}" for n in (forward, backward, forward + backward))]
        )
    part.tables.append(
        ReportTable(
            title=f"Operations of a step of {_MODEL}, TFLOP (counted)",
            header=["method", "forward", "backward", "both"],
            rows=rows,
            align="lr",
        )
    )
    shown = {
        METHOD_TITLES[method]: [counts[f"{phase}_flops"] / 1e12 for phase in _PHASES]
        for method, counts in operations.items()
    }
    draw = partial(stacked, shown, _PHASES, "TFLOP per step")
    part.charts.append(Chart(caption="Operations of a step, counted exactly", draw=draw))


def _add_times(part: Section, bench: dict[str, Any]) -> None:
    phases = (*_PHASES, "optimizer")
    rows, shown = [], {}
    for method in fig2.METHODS:
        row = row_of(bench, method)
        if "step_ms" in row:
            times = [row[f"{phase}_ms"] for phase in phases]
            shown[METHOD_TITLES[method]] = times
            rows.append([METHOD_TITLES[method], *(f"{n:.4g}" for n in (*times, row["step_ms"]))])
    table = ReportTable(
        title=f"Time of a step of {model_of(bench)}, ms (medians)",
        header=["method", *phases, "step"],
        rows=rows,
        note=machine_of(bench),
        align="lr",
    )
    part.tables.append(table)
    if shown:
        draw = partial(stacked, shown, phases, "ms per step")
        caption = f"Times of a step of {model_of(bench)}. {machine_of(bench)}"
        part.charts.append(Chart(caption=caption, draw=draw))


def _ours(
    claim: fig2.Claim, operations: dict[str, dict[str, Any]], bench: dict[str, Any] | None
) -> Measured | None:
    what, of = claim.what, claim.of
    if claim.quantity == "time":
        return None if bench is None else phase_ratio(bench, what, of)
    counts = [_operations(operations, *one) for one in (what, of)]
    if counts[0] is None or counts[1] is None:
        return None
    return Measured.exact(counts[0] / counts[1], "counted")


def _operations(operations: dict[str, dict[str, Any]], method: str, phase: str) -> int | None:
    if method not in operations:
        return None
    phases = _PHASES if phase == "step" else (phase,)
    return sum(int(operations[method][f"{name}_flops"]) for name in phases)


def settings(scale: Literal["small", "full"]) -> list[SettingsBeside]:
    """Return ours beside the paper's."""
    why = {
        "model": "operations are counted at the paper's size; times need a model that two cores "
        "step in a second",
        "precision": "what this processor multiplies fast",
        "optimizer": "the paper names none; it is timed, and its operations are not counted",
    }
    return [
        SettingsBeside(
            title=METHOD_TITLES[method],
            paper=table_8(method),
            ours=of_bench(_bench(scale), method),
            why=why,
        )
        for method in fig2.METHODS
    ]


FIGURE_2_EXPERIMENT = Experiment(
    name=NAME,
    title=fig2.TITLE,
    place=fig2.PLACE,
    methods=fig2.METHODS,
    cells=cells,
    section=section,
    settings=settings,
    cannot={},
)
