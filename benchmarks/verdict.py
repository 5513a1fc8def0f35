"""Say what studies found: that at equal cost by the rules of studies/cost.md, that of columns.

    python -m benchmarks.verdict            # reads results/cost.csv and cost-TASK.json

Prints what is better, worse or not told apart, what it costs and what it forgets, by task.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
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
TASKS = {
    "minilm": "MiniLM-L6, types of questions",
    "dinov2": "DINOv2-S, CIFAR-10",
    "smollm2-words": "SmolLM2-135M, words reversed",
    "smollm2-sort": "SmolLM2-135M, words sorted",
}
"""Name of a study, without `cost-` -> model and task."""
KEPT, LOSS = "kept for backward, bytes", "test loss"
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
    """Return an arm's runs by seed, at the rate with the best mean on validation data."""
    means = validated(runs, by)
    best = (min if by == "loss" else max)(means, key=lambda rate: means[rate])
    return {int(run["seed"]): run for run in runs if run["learning rate"] == best}


def validated(runs: Sequence[Run], by: str = "loss") -> dict[float, float]:
    """Return the mean on validation data of an arm's rates, which chooses one.

    It is over the seeds that three rates have, or all; a rate that lacks one has failed.
    """
    rates: dict[float, dict[float, float]] = {}
    for run in runs:
        rates.setdefault(run["learning rate"], {})[run["seed"]] = run[f"validation {by}"]
    every, enough = {seed for one in rates.values() for seed in one}, min(3, len(rates))
    common = {seed for seed in every if sum(seed in r for r in rates.values()) >= enough}
    return {
        rate: fmean(one[seed] for seed in common)
        for rate, one in rates.items()
        if common <= one.keys()
    }


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
    arms, ours = stage_two(study), two_of_paca(study)
    others = [arm for arm in arms if not is_paca(arm)]
    return _compared(arms, [*combinations(ours, 2), *product(ours, others)])


def settings(study: Study) -> dict[tuple[str, str], tuple[str, float, float]]:
    """Return the same of the settings of PaCA, the cheaper one first."""
    arms = stage_two(study)
    ours = sorted(filter(is_paca, arms), key=lambda arm: kept_of(study, arm))
    return _compared(arms, combinations(ours, 2))


def two_of_paca(study: Study) -> list[str]:
    """Return the first arm of PaCA, and the other one with the least mean validation loss."""
    others = [arm for arm in stage_two(study) if is_paca(arm) and arm != _FIRST]
    return [_FIRST, *sorted(others, key=lambda arm: min(validated(study[arm]).values()))[:1]]


def kept_of(study: Study, arm: str) -> float:
    """Return the bytes that an arm keeps for backward, of the batch that all arms see."""
    return {run["seed"]: run[KEPT] for run in study[arm]}[0]


def _compared(
    arms: Mapping[str, Mapping[int, Run]], pairs: Iterable[tuple[str, str]]
) -> dict[tuple[str, str], tuple[str, float, float]]:
    differences = {(a, b): paired(arms[a], arms[b], LOSS) for a, b in pairs}
    # Of arms that are equal in every run it is not a number.
    values = {pair: ttest_1samp(d, 0.0).pvalue for pair, d in differences.items()}
    corrected = holm({pair: 1.0 if np.isnan(p) else p for pair, p in values.items()})
    found = {}
    for pair, d in differences.items():
        said = "not told apart"
        if corrected[pair] < _LEVEL:
            said = "better" if fmean(d) < 0 else "worse"
        found[pair] = said, fmean(d), spread_of_mean(d)
    return found


def costs_no_more(ours: str, other: str, study: Study, steps: Mapping[str, float]) -> bool:
    """Whether an arm keeps no more bytes than another, and has no slower step."""
    is_smaller = kept_of(study, ours) <= kept_of(study, other)
    return is_smaller and steps[ours] <= _SLOWER * steps[other]


def forgotten(study: Study, ours: str, other: str, what: str) -> list[tuple[float, float, float]]:
    """Return by seed a test loss, and the rise of another loss of two arms at it.

    `what` is `general` or `unrelated`. Every rate and share of the update of a seed is a point; the
    test loss is the least that both reach.
    """
    found = []
    for seed in sorted(stage_two(study)[ours]):
        lines = [_frontier(study[arm], seed, what) for arm in (ours, other)]
        loss = max(losses[0] for losses, _ in lines)
        a, b = (float(np.interp(loss, losses, rises)) for losses, rises in lines)
        found.append((loss, a, b))
    return found


def rise_beyond(study: Study, ours: str, other: str, what: str) -> list[float]:
    """Return by seed the rise of another loss at equal test loss, ours minus theirs."""
    return [mine - theirs for _, mine, theirs in forgotten(study, ours, other, what)]


def _frontier(runs: Sequence[Run], seed: int, what: str) -> tuple[list[float], list[float]]:
    """Return test losses, rising, and the rise of another loss, falling: what nothing beats."""
    line: list[tuple[float, float]] = []
    for loss, rise in sorted(p for run in runs if run["seed"] == seed for p in points(run, what)):
        if not line or rise < line[-1][1]:
            line.append((loss, rise))
    return [loss for loss, _ in line], [rise for _, rise in line]


def points(run: Run, what: str) -> Iterator[tuple[float, float]]:
    """Yield test loss and the rise of another loss with each share of the update."""
    for name, loss in run.items():
        if name == LOSS or name.startswith(f"{LOSS} at "):
            when = name.removeprefix(LOSS).strip() or "after"
            yield loss, run[f"{what} loss {when}"] - run[f"{what} loss before"]


def arms_table(task: str, study: Study, results: Path) -> Table:
    """Return what each arm of the second stage reaches, costs and forgets, at its chosen rate."""
    rows, kinds = _costs(task, results), texts(study)
    states = {row.method: format_bytes(row.value) for row in rows if row.what == "state"}
    shares = {row.method: row.text() for row in rows if row.unit == "ratio"}
    header = ["arm", "rate", "test loss", "score, %", "kept for backward", f"step / {_FIRST}"]
    header += ["adapter, gradient, state of LLaMA3-8B"]
    header += [f"rise of the {kind} loss" for kind in kinds]
    cells = []
    for arm, by_seed in stage_two(study).items():
        runs = [*by_seed.values()]
        score = next(name for name in runs[0] if name in ("test accuracy", "test exact_match"))
        reached = [
            _mean_text([run[LOSS] for run in runs]),
            _mean_text([100 * run[score] for run in runs], digits=1),
        ]
        rises = [
            _mean_text([run[f"{kind} loss after"] - run[f"{kind} loss before"] for run in runs])
            for kind in kinds
        ]
        share, state = shares.get(f"{arm} / {_FIRST}", "1"), states.get(arm, "-")
        costs = [format_bytes(kept_of(study, arm)), share, state]
        cells.append([arm, f"{runs[0]['learning rate']:g}", *reached, *costs, *rises])
    return Table(header=header, cells=cells)


def _mean_text(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    return f"{fmean(values):{sign}.{digits}f} ± {spread_of_mean(values):.{digits}f}"


def rates_table(found: Mapping[str, Study]) -> Table:
    """Return the best rate of every arm, and its mean validation loss of the first two seeds."""
    shown: dict[str, dict[str, str]] = {}
    for task, study in found.items():
        for arm, runs in study.items():
            at_best = chosen(runs)
            rate = next(iter(at_best.values()))["learning rate"]
            loss = fmean(at_best[seed]["validation loss"] for seed in (0, 1))
            shown.setdefault(arm, {})[task] = f"{rate:g}: {loss:.3f}"
    cells = [[arm, *(one.get(task, "-") for task in found)] for arm, one in shown.items()]
    return Table(header=["arm", *(TASKS[task] for task in found)], cells=cells)


def forgetting_table(found: Mapping[str, Study]) -> Table:
    """Return what arms of PaCA and each LoRA forget at equal test loss."""
    cells = []
    for task, study in found.items():
        arms = stage_two(study)
        loras = [arm for arm in arms if arm.startswith(LORAS)]
        for kind, ours, lora in product(texts(study), two_of_paca(study), loras):
            at, mine, theirs = zip(*forgotten(study, ours, lora, kind), strict=True)
            less = rise_beyond(study, ours, lora, kind)
            numbers = [f"{fmean(values):.3f}" for values in (at, mine, theirs)]
            share = f"{fmean(mine) / fmean(theirs):.2f}" if min(*mine, *theirs) > 0 else "-"
            cells.append(
                [TASKS[task], kind, ours, lora, *numbers, _mean_text(less, sign="+"), share]
            )
    header = ["task", "text", "arm", "LoRA", "at a test loss of", "rise", "LoRA's rise"]
    return Table(header=[*header, "difference", "share"], cells=cells)


def said(found: Mapping[str, Study], steps: Mapping[str, Mapping[str, float]]) -> str:
    """Return a list of what is better, worse and not told apart, at equal cost and against less.

    And of settings of PaCA that are worse than another one, of which none can be a default.
    """
    lines = []
    for is_equal, where in ((True, ""), (False, " an arm that costs less")):
        for verdict in ("better", "worse", "not told apart"):
            parts = []
            for task, study in found.items():
                pairs = [
                    f"`{ours}` {_than(verdict)} `{other}` ({mean:+.3f} ± {half:.3f})"
                    for (ours, other), (what, mean, half) in compared(study).items()
                    if what == verdict
                    and costs_no_more(ours, other, study, steps[task]) == is_equal
                ]
                parts += [f"{TASKS[task]}: {', '.join(pairs)}"] if pairs else []
            if parts or is_equal:
                title = f"{verdict} {_than(verdict)}{where}".capitalize()
                lines.append(f"- **{title}:** {'; '.join(parts) or 'none'}.")
    worse = [
        f"`{ours}` than `{other}` on {TASKS[task]} ({mean:+.3f} ± {half:.3f})"
        for task, study in found.items()
        for (ours, other), (what, mean, half) in settings(study).items()
        if what == "worse"
    ]
    lines.append(
        f"- **Of settings of PaCA, worse than a dearer one:** {', '.join(worse) or 'none'}."
    )
    return "\n".join(lines)


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


def _than(verdict: str) -> str:
    return "from" if verdict == "not told apart" else "than"


def first_rows(results: Path = RESULTS) -> list[list[str]]:
    """Return what was found against LoRA and rsLoRA, for the README: title, PaCA, both."""
    found, rises = _found(results), dict[str, list[str]]()
    for task, study in found.items():
        if "general" in texts(study):
            ours = two_of_paca(study)[-1]
            loras = [arm for lora in LORAS for arm in stage_two(study) if arm.startswith(lora)]
            less = [rise_beyond(study, ours, lora, "general") for lora in loras]
            cells = [f"`{ours}`", *(_mean_text(values, sign="+") for values in less)]
            rises[TASKS[task]] = cells
    others = dict.fromkeys(arm for study in found.values() for arm in two_of_paca(study)[1:])
    named = ", ".join(f"`{arm}`" for arm in others)
    ours = f"`{_FIRST}`; the other PaCA with the least validation loss ({named})"
    title = f"test loss, {len(found)} tasks ([which](docs/quality.md))"
    rows = [[title, ours, *(_against(lora, found) for lora in LORAS)]]
    if rises:
        title = "rise of the loss on general text at equal test loss, minus theirs"
        cells = ["; ".join(values) for values in zip(*rises.values(), strict=True)]
        rows.append([f"{title}: {'; '.join(rises)}", *cells])
    return rows


def _against(lora: str, found: Mapping[str, Study]) -> str:
    """Return on which tasks PaCA is better or worse than a LoRA, and on how many neither."""
    said: dict[str, dict[str, list[str]]] = {}
    for task, study in found.items():
        for (ours, other), (what, *_) in compared(study).items():
            if other.startswith(lora):
                which = f"`{_FIRST}`" if ours == _FIRST else "the other"
                said.setdefault(which, {}).setdefault(what, []).append(TASKS[task])
    parts = []
    for which, tasks in said.items():
        words = [f"{w} on {', '.join(tasks[w])}" for w in ("better", "worse") if w in tasks]
        if "not told apart" in tasks:
            words.append(f"not told apart on {len(tasks['not told apart'])}")
        parts.append(f"{which}: {', '.join(words)}")
    return "; ".join(parts)


def texts(study: Study) -> list[str]:
    """Return the kinds of text of which a study has the loss before and after."""
    return [kind for kind in ("general", "unrelated") if f"{kind} loss after" in study[_FIRST][0]]


def block(what: str, results: Path = RESULTS) -> str:
    """Return a block of the docs: `selection`, `said`, `rates`, `forgetting`, or of a task."""
    if what == "selection":
        rows = differences(results, what, "random")
        return "\n".join(pivot(rows, ("method",), ("model", "what")).markdown())
    found = _found(results)
    if what in (tables := {"rates": rates_table, "forgetting": forgetting_table}):
        return "\n".join(tables[what](found).markdown())
    if what == "said":
        return said(found, {task: steps_of(task, results) for task in found})
    if what not in found:
        known = ", ".join(("selection", "said", *tables, *found))
        raise ValueError(f"no table {what!r} of a study; there are {known}.")
    return "\n".join(arms_table(what, found[what], results).markdown())


def _found(results: Path) -> dict[str, dict[str, list[Run]]]:
    return {name.removeprefix("cost-"): study for name, study in studies(results).items()}


def steps_of(task: str, results: Path = RESULTS) -> dict[str, float]:
    """Return the time of each arm's step."""
    return {row.method: row.value for row in _costs(task, results) if row.unit == "ms"}


def _costs(task: str, results: Path) -> list[Row]:
    """Return what the arms of a task cost; words to sort have the steps of words to reverse."""
    return read(f"cost-{task}".replace("-sort", "-words"), results).rows


def main() -> None:
    """Print what the rules say."""
    names = [name.removeprefix("cost-") for name in studies()]
    for what in ("said", *names, "forgetting", "rates"):
        print(f"{block(what)}\n")


if __name__ == "__main__":
    try:
        main()
    except FileNotFoundError as error:
        sys.exit(f"verdict: {error}")
