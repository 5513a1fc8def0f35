"""What the study at equal cost found, by the rules of studies/cost.md, from its runs."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean

import numpy as np

from benchmarks.results import RESULTS, read
from experiments.study.statistics import LOSS, Difference, Run, Study, chosen, read_runs, validated
from experiments.study.statistics import compared as compare_arms
from pacatune.reports.rows import spread_of_mean

LORAS = ("lora", "rslora")
TASKS = {
    "minilm": "MiniLM-L6, types of questions",
    "dinov2": "DINOv2-S, CIFAR-10",
    "smollm2-words": "SmolLM2-135M, words reversed",
    "smollm2-sort": "SmolLM2-135M, words sorted",
}
"""Name of a study, without `cost-` or `dial-` -> model and task."""
KEPT = "kept for backward, bytes"
_FIRST = "paca8"


def studies(results: Path = RESULTS, kind: str = "cost") -> dict[str, dict[str, list[Run]]]:
    """Return the runs of each task's arms, of a kind of studies."""
    runs = read_runs(results / f"{kind}.csv")
    return {name.removeprefix(f"{kind}-"): study for name, study in runs.items()}


def is_paca(arm: str) -> bool:
    """Whether an arm trains columns."""
    return arm.startswith(("paca", "pool", "spread", "c"))


def stage_two(study: Study) -> dict[str, dict[int, Run]]:
    """Return the arms that ran with all seeds, at their chosen rates."""
    by_seed = {arm: chosen(runs) for arm, runs in study.items()}
    most = max(map(len, by_seed.values()))
    return {arm: runs for arm, runs in by_seed.items() if len(runs) == most}


def two_of_paca(study: Study) -> list[str]:
    """Return the first arm of PaCA, and the other one with the least mean validation loss."""
    others = [arm for arm in stage_two(study) if is_paca(arm) and arm != _FIRST]
    return [_FIRST, *sorted(others, key=lambda arm: min(validated(study[arm]).values()))[:1]]


def compared(study: Study) -> dict[tuple[str, str], Difference]:
    """Return how two of PaCA differ from each other, and each of them from every other arm."""
    arms, ours = stage_two(study), two_of_paca(study)
    others = [arm for arm in arms if not is_paca(arm)]
    pairs = [*([(ours[0], ours[1])] if ours[1:] else []), *product(ours, others)]
    return compare_arms(arms, pairs)


def kept_of(study: Study, arm: str) -> float:
    """Return the bytes that an arm keeps for backward, of the batch that all arms see."""
    return {run["seed"]: run[KEPT] for run in study[arm]}[0]


def texts(study: Study) -> list[str]:
    """Return the kinds of text of which a study has the loss before and after."""
    (first, *_), *_ = study.values()
    return [kind for kind in ("general", "unrelated") if f"{kind} loss after" in first]


def points(run: Run, text: str) -> Iterator[tuple[float, float]]:
    """Yield the test loss, and the rise of another text's loss, at each share of the update."""
    for name, loss in run.items():
        if name == LOSS or name.startswith(f"{LOSS} at "):
            when = name.removeprefix(LOSS).strip() or "after"
            yield loss, run[f"{text} loss {when}"] - run[f"{text} loss before"]


def forgotten(
    study: Study, ours: str, other: str, text: str, seeds: Iterable[int]
) -> list[tuple[float, float, float]]:
    """Return by seed a test loss, and the rise of another text's loss of two arms at it.

    Every rate and share of the update of a seed is a point; the test loss is the least that both
    reach. Between points of least forgetting it is interpolated.
    """
    lines = []
    for seed in seeds:
        both = [_frontier(study[arm], seed, text) for arm in (ours, other)]
        loss = max(losses[0] for losses, _ in both)
        a, b = (float(np.interp(loss, losses, rises)) for losses, rises in both)
        lines.append((loss, a, b))
    return lines


def _frontier(runs: Sequence[Run], seed: int, text: str) -> tuple[list[float], list[float]]:
    """Return test losses, rising, and the rise of another loss, falling: what nothing beats."""
    line: list[tuple[float, float]] = []
    for loss, rise in sorted(p for run in runs if run["seed"] == seed for p in points(run, text)):
        if not line or rise < line[-1][1]:
            line.append((loss, rise))
    return [loss for loss, _ in line], [rise for _, rise in line]


def mean_text(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Return a mean with half of its 95 % interval."""
    return f"{fmean(values):{sign}.{digits}f} ± {spread_of_mean(values):.{digits}f}"


def kept_in(task: str, study: Study, results: Path = RESULTS) -> dict[str, float]:
    """Return what each arm keeps for backward: of a base in bfloat16 where a task has autocast.

    There, arms that no longer exist are missing.
    """
    counted = {r.method: r.value for r in read("cost-kept", results).rows if r.setting == task}
    return counted or {arm: kept_of(study, arm) for arm in stage_two(study)}


def steps_of(task: str, results: Path = RESULTS) -> dict[str, float]:
    """Return the time of each arm's step; words to sort have that of words to reverse."""
    rows = read(f"cost-{task}".replace("-sort", "-words"), results).rows
    return {row.method: row.value for row in rows if row.unit == "ms"}
