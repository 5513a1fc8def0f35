"""Say what the study of the dial found, by the rules of studies/dial.md.

    python -m benchmarks.verdict                    # reads results/dial.csv and cost-*.json
    python -m benchmarks.verdict --power            # what all seeds will tell, from the first three
    python -m benchmarks.verdict --collect DIR...   # adds runs of a study to results/dial.csv

Prints, by task, how arms differ; what they reach, cost and forget; then the default and whether
`channels` stays. Runs that are missing are named: all is said of those that are there,
and of arms with two seeds or more.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

from scipy.stats import t as student

from benchmarks.results import RESULTS, ROOT, new_parser, read
from benchmarks.study_runs import KEPT, TASKS, Arms, forgetting, is_paca, reached, title, told
from benchmarks.study_runs import studies as read_studies
from experiments.study.config import StudyConfig, read_study
from experiments.study.statistics import (
    LEVEL,
    LOSS,
    Difference,
    Run,
    Study,
    chosen,
    compared,
    paired,
    read_runs,
    write_runs,
)
from pacatune.files.folder import format_bytes
from pacatune.reports.rows import Table

_FIRST, _RIVAL = "paca16", "lora16"
REFERENCES = (_FIRST, "paca64", _RIVAL)
"""With these each arm is compared."""
JUDGED = ("c64", "c8th")
"""Arms that decide whether `channels` stays."""
_PLANNED = ("minilm", "dinov2-digits", "smollm2-words", "smollm2-sort")
_ENOUGH = 2  # tasks on which one of them is better
_KEPT_AT_8B, _STATE = "kept for backward", "state"


@cache
def plans() -> dict[str, StudyConfig]:
    """Return the study of each task, as it was planned."""
    folder = ROOT / "experiments" / "study"
    return {task: read_study(folder / f"dial-{task}.yaml") for task in _PLANNED}


def studies(results: Path = RESULTS) -> dict[str, Study]:
    """Return the runs of each task that has arms with two seeds, the arms as they were planned."""
    there = read_studies(results, "dial") if (results / "dial.csv").is_file() else {}
    ordered = {}
    for task, plan in plans().items():
        study = there.get(task, {})
        if arms_of(study):
            ordered[task] = {arm: study[arm] for arm in plan.arms if arm in study}
    return ordered


def arms_of(study: Study) -> Arms:
    """Return the arms with two seeds or more."""
    arms = {arm: chosen(runs) for arm, runs in study.items()}
    return {arm: runs for arm, runs in arms.items() if len(runs) > 1}


def has_all_seeds(tasks: Mapping[str, Study], *arms: str) -> bool:
    """Return whether all runs of these arms that are planned are there."""
    return all(
        len(chosen(tasks.get(task, {}).get(arm, []))) >= len(plan.seeds)
        for task, plan in plans().items()
        for arm in arms
    )


def missing(tasks: Mapping[str, Study]) -> list[str]:
    """Say which runs of the plan are not there."""
    lines = []
    for task, plan in plans().items():
        counts = {arm: len(chosen(tasks.get(task, {}).get(arm, []))) for arm in plan.arms}
        few = [f"{arm} {n}" for arm, n in counts.items() if n < len(plan.seeds)]
        if task not in tasks:
            lines.append(f"{TASKS[task]}: no arm has two seeds")
        elif few:
            lines.append(f"{TASKS[task]}: fewer than {len(plan.seeds)} seeds: {', '.join(few)}")
    return lines


def pairs_of(arms: Iterable[str]) -> list[tuple[str, str]]:
    """Return each arm with each of `REFERENCES`, no two arms twice."""
    pairs: list[tuple[str, str]] = []
    for ours, other in product(arms, REFERENCES):
        if ours != other and other in arms and (other, ours) not in pairs:
            pairs.append((ours, other))
    return pairs


def differences(study: Study) -> dict[tuple[str, str], Difference]:
    """Return how arms differ in test loss, by rule 1."""
    arms = arms_of(study)
    return compared(arms, pairs_of(arms))


def power(study: Study, plan: StudyConfig) -> dict[tuple[str, str], tuple[float, float]]:
    """Return what all seeds of a plan will tell of pairs, from the spread of the first three.

    That is half of the 95 % interval of a difference, and the difference that is significant even
    if it is the first that Holm's method looks at.
    """
    arms, number, first = arms_of(study), len(plan.seeds), plan.seeds[:3]
    early = {arm: {s: runs[s] for s in first if s in runs} for arm, runs in arms.items()}
    pairs = pairs_of(arms)
    foreseen = {}
    for ours, other in pairs:
        by_seed = paired(early[ours], early[other])
        if len(by_seed) == len(first):
            error = stdev(by_seed) / math.sqrt(number)
            tails = (LEVEL / 2, LEVEL / 2 / len(pairs))
            half, strict = (error * float(student.isf(tail, number - 1)) for tail in tails)
            foreseen[ours, other] = half, strict
    return foreseen


def power_table(study: Study, plan: StudyConfig) -> Table:
    """Return what all seeds will tell of the pairs that have the first three."""
    header = ["arm", "against", f"half interval of {len(plan.seeds)} seeds", "told by Holm's first"]
    cells = [[*pair, *(f"{n:.3f}" for n in both)] for pair, both in power(study, plan).items()]
    return Table(header=header, cells=cells, num_index=2)


def differences_table(study: Study, plan: StudyConfig) -> Table:
    """Return how arms differ, and the half interval that three seeds foresaw."""
    arms, foreseen = arms_of(study), power(study, plan)
    cells = []
    for (ours, other), found in differences(study).items():
        seeds = len(arms[ours].keys() & arms[other].keys())
        half = f"{foreseen[ours, other][0]:.3f}" if (ours, other) in foreseen else "-"
        shown = f"{found.mean:+.3f} ± {found.half_interval:.3f}"
        cells.append([ours, other, str(seeds), shown, f"{found.p:.2g}", found.said, half])
    header = ["arm", "against", "seeds", "difference of test loss", "p", "", "foreseen ±"]
    return Table(header=header, cells=cells, num_index=2)


def losses_of(arms: Arms) -> dict[str, list[float]]:
    """Return the test losses of arms, of the seeds that all have."""
    seeds = set.intersection(*(set(runs) for runs in arms.values()))
    return {arm: [runs[seed][LOSS] for seed in sorted(seeds)] for arm, runs in arms.items()}


def frontier(costs: Mapping[str, float], losses: Mapping[str, float]) -> set[str]:
    """Return the arms than which none costs no more, loses no more, and is not the same."""
    points = {arm: (cost, losses[arm]) for arm, cost in costs.items()}

    def is_beaten(point: tuple[float, float]) -> bool:
        others = (p for p in points.values() if p != point)
        return any(cost <= point[0] and loss <= point[1] for cost, loss in others)

    return {arm for arm, point in points.items() if not is_beaten(point)}


def costs_of(task: str, results: Path = RESULTS) -> dict[str, dict[str, float]]:
    """Return what arms keep of a batch, the seconds of their step, and their state at 8B."""
    setting = task.replace("-words", "-sort")  # whose steps are equal
    rows = read(f"cost-{setting}", results).rows
    kept = {row.method: row.value for row in rows if row.what == KEPT}
    step = {row.method: row.value for row in rows if row.what == "step" and row.unit != "ratio"}
    state = at_8b(results)[_STATE]
    return {"kept": kept, "step": step, "state": {arm: state[arm] for arm in kept}}


def frontiers(tasks: Mapping[str, Study], results: Path = RESULTS) -> Table:
    """Return which arms are on the frontier of each cost, by task (rule 2)."""
    cells = []
    for task, study in tasks.items():
        means = {arm: fmean(losses) for arm, losses in losses_of(arms_of(study)).items()}
        line = [title(task)]
        for costs in costs_of(task, results).values():
            found = frontier({arm: costs[arm] for arm in means}, means)
            line.append(", ".join(f"`{arm}`" for arm in means if arm in found))
        cells.append(line)
    header = ["", "bytes kept for backward", "time of a step", "state of LLaMA3-8B"]
    return Table(header=header, cells=cells)


def costs_table(results: Path = RESULTS) -> Table:
    """Return what arms keep, and their step beside LoRA's, by task; and both costs at 8B."""
    models = {"minilm": "MiniLM-L6", "dinov2-digits": "DINOv2-S", "smollm2-sort": "SmolLM2-135M"}
    costs, cells = {task: costs_of(task, results) for task in models}, []
    for arm in (large := at_8b(results))[_STATE]:
        line = [f"`{arm}`"]
        for cost in costs.values():
            kept, step = (cost[what].get(arm) for what in ("kept", "step"))
            is_there = kept is not None and step is not None
            share = f"{step / cost['step'][_RIVAL]:.2f}" if is_there else ""
            line.append(f"{format_bytes(kept)}; {share}" if is_there else "-")
        cells.append([*line, *(format_bytes(large[what][arm]) for what in (_KEPT_AT_8B, _STATE))])
    names = [f"{model}, kept; step" for model in models.values()]
    return Table(header=["arm", *names, "LLaMA3-8B, kept", "its state"], cells=cells)


def default(
    tasks: Mapping[str, Study], costs: Mapping[str, float]
) -> tuple[str | None, dict[str, str]]:
    """Return the arm that rule 4 takes, None without any, and why it takes no other of PaCA.

    It has run on each of the tasks, and is worse on none than the arm of PaCA that is best there;
    p-values are corrected for the number of arms that are compared with that.
    """
    ours = [{a: runs for a, runs in arms_of(s).items() if is_paca(a)} for s in tasks.values()]
    reasons: dict[str, list[str]] = {arm: [] for arms in ours for arm in arms}
    for task, arms in zip(tasks, ours, strict=True):
        means = {arm: fmean(losses) for arm, losses in losses_of(arms).items()}
        best = min(means, key=lambda arm: means[arm])
        told = compared(arms, [(arm, best) for arm in arms if arm != best])
        for arm, why in reasons.items():
            if arm not in arms:
                why.append(f"not run on {TASKS[task]}")
            elif arm != best and told[arm, best].said == "worse":
                why.append(f"worse than {best} on {TASKS[task]}")
    left = [arm for arm, why in reasons.items() if not why]
    # Of equal costs the paper's form, the fewest columns first.
    taken = min(left, key=lambda arm: (costs[arm], not arm.startswith("paca")), default=None)
    others = {arm: "; ".join(why) or "costs as much or more" for arm, why in reasons.items()}
    return taken, {arm: why for arm, why in others.items() if arm != taken}


def fate_of_channels(tasks: Mapping[str, Study]) -> tuple[str, dict[str, list[str]]]:
    """Return what becomes of `channels` by rule 5, and where each arm is better than paca16.

    Better is a difference whose interval is below zero, whatever the number of pairs. It is open
    while tasks that are missing can decide.
    """
    better: dict[str, list[str]] = {arm: [] for arm in JUDGED}
    unknown = dict.fromkeys(JUDGED, len(plans()) - len(tasks))
    for task, study in tasks.items():
        told = differences(study)
        for arm in JUDGED:
            if (arm, _FIRST) not in told:
                unknown[arm] += 1
            elif told[arm, _FIRST].mean + told[arm, _FIRST].half_interval < 0:
                better[arm].append(task)
    if any(len(where) >= _ENOUGH for where in better.values()):
        return "stays", better
    can_stay = any(len(better[arm]) + unknown[arm] >= _ENOUGH for arm in JUDGED)
    return "is open" if can_stay else "leaves", better


def said(results: Path = RESULTS) -> Iterator[str]:
    """Yield what the rules say."""
    tasks, costs = studies(results), at_8b(results)
    missed = missing(tasks)
    yield from (f"Missing: {line}." for line in missed)
    for task, study in tasks.items():
        table = differences_table(study, plans()[task])
        yield from (f"\n{TASKS[task]}", "", *table.markdown())
    if tasks:
        yield from (f"\n{block(name, results)}" for name in _BLOCKS)
    sums = {arm: costs[_KEPT_AT_8B][arm] + state for arm, state in costs[_STATE].items()}
    taken, others = default(tasks, sums)
    so_far = " so far" if missed else ""
    kept = f" ({format_bytes(sums[taken])} kept and in state at 8B)" if taken else ""
    yield f"\nDefault{so_far} (rule 4): {taken or 'none'}{kept}."
    yield from (f"- Not {arm} ({format_bytes(sums[arm])}): {why}." for arm, why in others.items())
    fate, better = fate_of_channels(tasks)
    where = [f"{arm} on {', '.join(map(TASKS.get, at)) or 'none'}" for arm, at in better.items()]
    yield f"`channels` {fate}{so_far} (rule 5): better than {_FIRST} is {'; '.join(where)}."


def _shown(study: Study) -> dict[tuple[str, str], Difference]:
    """Return how the arms that images were planned with differ from the default and LoRA."""
    found = differences(study)
    main = plans()["dinov2-digits"].arms
    return {pair: found[pair] for pair in found if pair[0] in main and pair[1] in (_FIRST, _RIVAL)}


_BLOCKS: Mapping[str, Callable[[Mapping[str, Study], Path], Table | str]] = {
    "reached": lambda tasks, _: reached({task: arms_of(study) for task, study in tasks.items()}),
    "told": lambda tasks, _: told({task: _shown(study) for task, study in tasks.items()}),
    "costs": lambda _, results: costs_table(results),
    "frontiers": frontiers,
    "forgotten": lambda tasks, _: forgetting(tasks, (_FIRST, *JUDGED)),
}
"""Name of a block of the docs -> what makes it."""


def block(name: str, results: Path = RESULTS) -> str:
    """Return the text of a block `dial-NAME` of the docs."""
    table = _BLOCKS[name](studies(results), results)
    return table if isinstance(table, str) else "\n".join(table.markdown())


def at_8b(results: Path = RESULTS) -> dict[str, dict[str, float]]:
    """Return what arms keep for backward, and their state, of LLaMA3-8B, in bytes."""
    costs: dict[str, dict[str, float]] = {}
    for row in read("cost-8b", results).rows:
        costs.setdefault(row.what, {})[row.method] = row.value
    return costs


def collect(folders: Sequence[Path], path: Path) -> None:
    """Add a line for each run of studies' folders that has ended well, as yet."""
    runs: dict[str, dict[tuple[str, float, int], Run]] = {
        study: {
            (arm, run["learning rate"], int(run["seed"])): run for arm in arms for run in arms[arm]
        }
        for study, arms in (read_runs(path) if path.is_file() else {}).items()
    }
    for folder in folders:
        for file in (folder / "jobs").glob("*.json"):
            job = json.loads(file.read_text(encoding="utf-8"))
            if "error" in job:
                continue
            training = job["inputs"]["run"]["training"]
            rate, seed = training["learning_rate"], float(training["seed"])
            run = {"learning rate": rate, "seed": seed, "seconds": job["provenance"]["seconds"]}
            run |= {row["what"]: row["value"] for row in job["rows"]}
            runs.setdefault(folder.name, {})[job["rows"][0]["method"], rate, seed] = run
    path.parent.mkdir(parents=True, exist_ok=True)
    write_runs(runs, path)


def main(options: list[str] | None = None) -> None:
    """Print what the rules say, or do what an option asks for."""
    parser = new_parser(__doc__)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--power", action="store_true", help="what all seeds will tell, from the first three")
    add("--collect", type=Path, nargs="+", metavar="DIR", help="add these studies to dial.csv")
    args = parser.parse_args(options)
    if args.collect:
        collect(args.collect, args.output / "dial.csv")
    elif args.power:
        for task, study in studies(args.output).items():
            print(TASKS[task], "", *power_table(study, plans()[task]).markdown(), "", sep="\n")
    else:
        print(*said(args.output), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
