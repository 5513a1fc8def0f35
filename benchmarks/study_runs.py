"""Runs of the studies at equal cost and of the dial, and tables of what they found."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from textwrap import fill

import numpy as np

from benchmarks.results import RESULTS
from experiments.study.statistics import LOSS, Difference, Run, Study, chosen, judged, read_runs
from pacatune.reports.rows import Table, spread_of_mean

Arms = Mapping[str, Mapping[int, Run]]
"""Arm -> its runs at the chosen rate, by seed."""
LORAS = ("lora16", "rslora16")
TASKS = {
    "minilm": "MiniLM-L6, types of questions",
    "dinov2": "DINOv2-S, CIFAR-10",
    "dinov2-digits": "DINOv2-S, digits",
    "smollm2-words": "SmolLM2-135M, words reversed",
    "smollm2-sort": "SmolLM2-135M, words sorted",
}
"""Name of a study, without `cost-` or `dial-` -> model and task."""
KEPT = "kept for backward, bytes"


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


def title(task: str) -> str:
    """Return the name of a task, as columns have it."""
    return TASKS[task].removesuffix("types of questions").rstrip(", ")


def text_of(difference: Difference) -> str:
    """Return a difference with its interval, and a word if it is significant."""
    word = f", **{difference.said}**" if difference.said in ("better", "worse") else ""
    return f"{difference.mean:+.3f} ± {difference.half_interval:.3f}{word}"


def reached(tasks: Mapping[str, Arms]) -> Table:
    """Return the test loss and the score of arms, by task."""
    lines: dict[str, dict[str, str]] = {}
    for task, arms in tasks.items():
        for arm, by_seed in arms.items():
            runs = [*by_seed.values()]
            name = next(n for n in ("test accuracy", "test exact_match") if n in runs[0])
            score = f"{100 * fmean(run[name] for run in runs):.1f} %"
            text = f"{mean_text([run[LOSS] for run in runs])}; {score}"
            lines.setdefault(arm, {})[task] = text
    cells = [[f"`{arm}`", *(line.get(task, "-") for task in tasks)] for arm, line in lines.items()]
    return Table(header=["arm", *map(title, tasks)], cells=cells)


def told(tasks: Mapping[str, Mapping[tuple[str, str], Difference]]) -> Table:
    """Return how pairs of arms differ in test loss, by task."""
    pairs = dict.fromkeys(pair for found in tasks.values() for pair in found)
    cells = [
        [
            f"`{ours}` minus `{other}`",
            *(
                text_of(found[ours, other]) if (ours, other) in found else "-"
                for found in tasks.values()
            ),
        ]
        for ours, other in pairs
    ]
    return Table(header=["", *map(title, tasks)], cells=cells)


def forgetting(tasks: Mapping[str, Study], ours: Sequence[str]) -> str:
    """Return what arms of PaCA forget more than each LoRA at equal test loss, and the sum of it.

    By Holm's method over all of the table.
    """
    found: dict[tuple[str, str, str, str], list[float]] = {}
    for task, study in tasks.items():
        arms = {arm: chosen(runs) for arm, runs in study.items()}
        for text, lora, arm in product(texts(study), LORAS, ours):
            if seeds := sorted(arms.get(arm, {}).keys() & arms.get(lora, {}).keys()):
                points = forgotten(study, arm, lora, text, seeds)
                found[task, text, lora, arm] = [mine - theirs for _, mine, theirs in points]
    by_pair = judged(found)
    lines = dict.fromkeys(key[:3] for key in found)
    cells = [
        [
            title(line[0]),
            line[1],
            f"`{line[2]}`",
            *(text_of(by_pair[*line, arm]) if (*line, arm) in by_pair else "-" for arm in ours),
        ]
        for line in lines
    ]
    shown = Table(
        header=["task", "text", "LoRA", *(f"`{a}`" for a in ours)], cells=cells, num_index=3
    )
    less = sum(difference.mean < 0 for difference in by_pair.values())
    least = min(difference.p for difference in by_pair.values())
    many = sum(difference.said in ("better", "worse") for difference in by_pair.values())
    said = (
        f"The mean is less in {less} of {len(by_pair)} comparisons; **{many or 'none'} of them "
        f"{'is' if many < 2 else 'are'} significant**: the smallest p, corrected by Holm's method "
        f"over all of them, is {least:.2f}."
    )
    return "\n".join([*shown.markdown(), "", fill(said, width=120)])
