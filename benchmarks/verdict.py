"""Say what studies found: that at equal cost by the rules of studies/cost.md, that of columns.

    python -m benchmarks.verdict            # reads results/cost.csv and cost-steps.json

Prints what is better, worse or not told apart, what it costs and what it forgets, by task.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import ttest_1samp

from benchmarks.collect import read_runs
from benchmarks.results import RESULTS, mean_row, read
from pacatune.files.folder import format_bytes
from pacatune.reports.rows import Row, Table, spread_of_mean
from pacatune.reports.rows import table as pivot

Run = Mapping[str, float]
"""What was measured -> value; the rate and the seed among it."""
Study = Mapping[str, Sequence[Run]]
"""Arm -> its runs."""
LORAS = ("lora", "rslora")
_KEPT, _LOSS = "kept for backward, bytes", "test loss"
_LEVEL, _SLOWER = 0.05, 1.03
_FIRST = "paca8"


def studies(results: Path = RESULTS, kind: str = "cost") -> dict[str, dict[str, list[Run]]]:
    """Return the runs of each task's arms."""
    found: dict[str, dict[str, list[Run]]] = {}
    for row in read_runs(kind, results):
        numbers = {k: float(v) for k, v in row.items() if v and k not in ("study", "arm", "key")}
        found.setdefault(row["study"], {}).setdefault(row["arm"], []).append(numbers)
    return found


def chosen(runs: Sequence[Run], by: str = "loss") -> dict[int, Run]:
    """Return an arm's runs by seed, at the rate with the best mean on validation data.

    The mean is over the seeds that three rates have, or all; a rate that lacks one has failed.
    """
    rates: dict[float, dict[int, Run]] = {}
    for run in runs:
        rates.setdefault(run["learning rate"], {})[int(run["seed"])] = run
    every = {seed for one in rates.values() for seed in one}
    enough = min(3, len(rates))
    common = {seed for seed in every if sum(seed in r for r in rates.values()) >= enough}
    means = {
        rate: fmean(one[seed][f"validation {by}"] for seed in common)
        for rate, one in rates.items()
        if common <= one.keys()
    }
    best = min if by == "loss" else max
    return rates[best(means, key=lambda rate: means[rate])]


def paired(ours: Mapping[int, Run], theirs: Mapping[int, Run], what: str) -> list[float]:
    """Return the differences by seed, ours minus theirs."""
    return [ours[seed][what] - theirs[seed][what] for seed in sorted(ours.keys() & theirs.keys())]


def holm(values: Mapping[Any, float]) -> dict[Any, float]:
    """Return p-values corrected for their number, by Holm's method."""
    found, largest = {}, 0.0
    for place, key in enumerate(sorted(values, key=lambda key: values[key])):
        found[key] = largest = max(largest, min(1.0, (len(values) - place) * values[key]))
    return found


def is_paca(arm: str) -> bool:
    """Whether an arm trains columns."""
    return arm.startswith(("paca", "pool", "spread"))


def stage_two(study: Study) -> dict[str, dict[int, Run]]:
    """Return the arms that ran with all seeds, at their chosen rates."""
    found = {arm: chosen(runs) for arm, runs in study.items()}
    most = max(map(len, found.values()))
    return {arm: runs for arm, runs in found.items() if len(runs) == most}


def compared(study: Study) -> dict[tuple[str, str], tuple[str, float, float]]:
    """Return of each pair, PaCA first, what it is, and mean and half interval of the difference."""
    arms = stage_two(study)
    pairs = [sorted(pair, key=is_paca, reverse=True) for pair in combinations(arms, 2)]
    differences = {(a, b): paired(arms[a], arms[b], _LOSS) for a, b in pairs if is_paca(a)}
    corrected = holm({pair: ttest_1samp(d, 0.0).pvalue for pair, d in differences.items()})
    found = {}
    for pair, d in differences.items():
        said = "not told apart"
        if corrected[pair] < _LEVEL:
            said = "better" if fmean(d) < 0 else "worse"
        found[pair] = said, fmean(d), spread_of_mean(d)
    return found


def costs_no_more(ours: str, other: str, study: Study, steps: Mapping[str, float]) -> bool:
    """Whether an arm keeps no more bytes than another, and has no slower step."""
    kept = {arm: {run["seed"]: run[_KEPT] for run in study[arm]}[0] for arm in (ours, other)}
    return kept[ours] <= kept[other] and steps[ours] <= _SLOWER * steps[other]


def forgotten(study: Study, ours: str, other: str, what: str) -> list[float]:
    """Return by seed how much an arm forgets as a share of another, at equal test loss.

    `what` is `general` or `unrelated`. Every rate and share of the update of a seed is a point; the
    loss is the least that both reach.
    """
    shares = []
    for seed in sorted(stage_two(study)[ours]):
        lines = [_frontier(study[arm], seed, what) for arm in (ours, other)]
        loss = max(line[0][0] for line in lines)
        a, b = (float(np.interp(loss, *zip(*line, strict=True))) for line in lines)
        shares.append(a / b)
    return shares


def _frontier(runs: Sequence[Run], seed: int, what: str) -> list[tuple[float, float]]:
    """Return test losses, rising, and the rise of another loss, falling: what nothing beats."""
    points = []
    for run in (run for run in runs if run["seed"] == seed):
        before = run[f"{what} loss before"]
        for name, loss in run.items():
            if name == _LOSS or name.startswith(f"{_LOSS} at "):
                when = name.removeprefix(_LOSS).strip() or "after"
                points.append((loss, run[f"{what} loss {when}"] - before))
    line: list[tuple[float, float]] = []
    for loss, rise in sorted(points):
        if not line or rise < line[-1][1]:
            line.append((loss, rise))
    return line


def arms_table(study: Study, steps: Mapping[str, float]) -> Table:
    """Return what each arm of the second stage reaches, costs and forgets, at its chosen rate."""
    header = ["arm", "rate", "test loss", "score, %", "kept for backward", f"step / {_FIRST}"]
    kinds = [kind for kind in ("general", "unrelated") if f"{kind} loss after" in study[_FIRST][0]]
    header += [f"rise of the {kind} loss" for kind in kinds]
    cells = []
    for arm, runs in stage_two(study).items():
        run = next(iter(runs.values()))
        score = next(name for name in run if name in ("test accuracy", "test exact_match"))
        values = [
            [one[_LOSS] for one in runs.values()],
            [100 * one[score] for one in runs.values()],
            *(
                [one[f"{kind} loss after"] - one[f"{kind} loss before"] for one in runs.values()]
                for kind in kinds
            ),
        ]
        loss, score_text, *rises = (f"{fmean(v):.3f} ± {spread_of_mean(v):.3f}" for v in values)
        rate, kept = f"{run['learning rate']:g}", format_bytes(run[_KEPT])
        share = f"{steps[arm] / steps[_FIRST]:.2f}"
        cells.append([arm, rate, loss, score_text, kept, share, *rises])
    return Table(header=header, cells=cells)


def differences(results: Path, kind: str, first: str) -> list[Row]:
    """Return the score of each arm at its best rate minus that of the first, seed by seed."""
    found = []
    for name, study in studies(results, kind).items():
        is_share = "test accuracy" in study[first][0]
        metric, unit, factor = ("accuracy", "%", 100) if is_share else ("loss", "", 1)
        rows = {}
        for arm, runs in study.items():
            at_best = sorted(chosen(runs, metric).items())
            each = {str(seed): factor * run[f"test {metric}"] for seed, run in at_best}
            names = {"model": name.removeprefix(f"{kind}-"), "unit": unit}
            rows[arm] = mean_row(f"test {metric}", arm, each, **names)
        others = [row for arm, row in rows.items() if arm != first]
        found += [replace(row.minus(rows[first]), method=row.method) for row in others]
    return found


def block(what: str, results: Path = RESULTS) -> str:
    """Return a table of docs/quality.md: of columns' `selection`, of a `TASK`, or `TASK-arms`."""
    if what == "selection":
        rows = differences(results, what, "random")
        return "\n".join(pivot(rows, ("method",), ("model", "what")).markdown())
    task = what.removesuffix("-arms")
    name = f"cost-{task}"
    study, steps = studies(results)[name], steps_of(results).get(name, {})
    made = table(task, study, steps) if what == task else arms_table(study, steps)
    return "\n".join(made.markdown())


def steps_of(results: Path = RESULTS) -> dict[str, dict[str, float]]:
    """Return the time of each arm's step, by study; words to sort have the steps of the others."""
    found: dict[str, dict[str, float]] = {}
    for row in read("cost-steps", results).rows:
        if row.what == "step" and row.unit != "ratio":
            found.setdefault(row.model, {})[row.method] = row.value
    return {**found, "cost-smollm2-sort": found.get("cost-smollm2-words", {})}


def table(name: str, study: Study, steps: Mapping[str, float]) -> Table:
    """Return the pairs of a task."""
    header = [name, "than", "is", "difference of the test loss", "at no more cost"]
    cells = [
        [ours, other, said, f"{mean:+.4f} ± {half:.4f}", _yes(ours, other, study, steps)]
        for (ours, other), (said, mean, half) in compared(study).items()
    ]
    return Table(header=header, cells=cells)


def _yes(ours: str, other: str, study: Study, steps: Mapping[str, float]) -> str:
    return "yes" if costs_no_more(ours, other, study, steps) else "no"


def main() -> None:
    """Print what the rules say."""
    for name, study in studies().items():
        steps = steps_of().get(name, {})
        print("\n".join([*arms_table(study, steps).markdown(), ""]))
        print("\n".join([*table(name, study, steps).markdown(), ""]))
        loras = [arm for arm in stage_two(study) if arm.startswith(LORAS)]
        for ours in filter(is_paca, stage_two(study)):
            for what in ("general", "unrelated"):
                if f"{what} loss after" in study[ours][0]:
                    told = (f"{other} {_share(study, ours, other, what)}" for other in loras)
                    print(f"{name}: {ours} forgets ({what} text), as a share: {', '.join(told)}")


def _share(study: Study, ours: str, other: str, what: str) -> str:
    shares = forgotten(study, ours, other, what)
    return f"{fmean(shares):.2f} ± {spread_of_mean(shares):.2f}"


if __name__ == "__main__":
    try:
        main()
    except FileNotFoundError as error:
        sys.exit(f"verdict: {error}")
