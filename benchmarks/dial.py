"""Say what the study of the dial found, by the rules of studies/dial.md.

    python -m benchmarks.dial                    # reads results/dial.csv, dial-cost, dial-steps
    python -m benchmarks.dial --power            # what all seeds will tell, from the first three
    python -m benchmarks.dial --collect DIR...   # adds runs of a study to results/dial.csv
    python -m benchmarks.dial --cost-of-arms     # writes results/dial-cost.json, of LLaMA3-8B

Prints, by task, how arms differ, what they reach and cost, and what they forget; then the default
and whether `channels` stays. Runs that are missing are named: all is said of those that are there,
and of arms with two seeds or more.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

from scipy.stats import t as student

from benchmarks import verdict
from benchmarks.results import RESULTS, ROOT, new_parser, read, record
from benchmarks.verdict import KEPT, LORAS, TASKS, forgotten, is_paca, mean_text, texts
from experiments.study.config import StudyConfig, read_study
from experiments.study.statistics import (
    LEVEL,
    LOSS,
    Difference,
    Run,
    Study,
    chosen,
    compared,
    judged,
    paired,
    read_runs,
    write_runs,
)
from pacatune.files.folder import format_bytes
from pacatune.measure.estimate import estimate_memory
from pacatune.measure.setting import Setting
from pacatune.reports.rows import Row, Table

Arms = Mapping[str, Mapping[int, Run]]
"""Arm -> its runs at the chosen rate, by seed."""
_FIRST, _RIVAL = "paca16", "lora16"
REFERENCES = (_FIRST, "paca64", _RIVAL)
"""With these each arm is compared."""
JUDGED = ("c64", "c8th")
"""Arms that decide whether `channels` stays."""
_ENOUGH = 2  # tasks on which one of them is better
_KEPT_AT_8B, _STATE = "kept for backward", "state"


@cache
def plans() -> dict[str, StudyConfig]:
    """Return the study of each task, as it was planned."""
    folder = ROOT / "experiments" / "study"
    return {task: read_study(folder / f"dial-{task}.yaml") for task in TASKS}


def studies(results: Path = RESULTS) -> dict[str, Study]:
    """Return the runs of each task that has arms with two seeds, the arms as they were planned."""
    there = verdict.studies(results, "dial") if (results / "dial.csv").is_file() else {}
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
    for (ours, other), difference in differences(study).items():
        seeds = len(arms[ours].keys() & arms[other].keys())
        half = f"{foreseen[ours, other][0]:.3f}" if (ours, other) in foreseen else "-"
        cells.append([ours, other, str(seeds), *_texts(difference), half])
    header = ["arm", "against", "seeds", "difference of test loss", "p", "", "foreseen ±"]
    return Table(header=header, cells=cells, num_index=2)


def _texts(difference: Difference) -> list[str]:
    """Return a difference with its interval, its p, and what it is called."""
    shown = f"{difference.mean:+.3f} ± {difference.half_interval:.3f}"
    return [shown, f"{difference.p:.2g}", difference.said]


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


def arms_table(task: str, study: Study, results: Path = RESULTS) -> Table:
    """Return what arms reach and cost, and by which costs they are on a frontier (rule 2)."""
    arms, told, state = arms_of(study), differences(study), at_8b(results)[_STATE]
    losses, setting = losses_of(arms), task.replace("-words", "-sort")  # whose steps are equal
    rows = [row for row in read("dial-steps", results).rows if row.setting == setting]
    measured = {(row.what, row.method): row.value for row in rows}
    costs = {
        "kept": {arm: measured[KEPT, arm] for arm in arms},
        "step": {arm: measured["step", arm] for arm in arms},
        "state": {arm: state[arm] for arm in arms},
    }
    means = {arm: fmean(values) for arm, values in losses.items()}
    best = {what: frontier(values, means) for what, values in costs.items()}
    cells = []
    for arm, runs in arms.items():
        rate = f"{next(iter(runs.values()))['learning rate']:g}"
        shown, _, said = _texts(told[arm, _RIVAL]) if (arm, _RIVAL) in told else ("-", "", "-")
        kept, step, held = (values[arm] for values in costs.values())
        sizes = [format_bytes(kept), f"{step:.0f}", format_bytes(held)]
        on = ", ".join(what for what, names in best.items() if arm in names) or "-"
        cells.append([arm, rate, mean_text(losses[arm]), shown, said, *sizes, on])
    header = ["arm", "rate", "test loss", f"minus {_RIVAL}", "", "kept for backward", "step, ms"]
    return Table(header=[*header, "state of LLaMA3-8B", "on the frontier of"], cells=cells)


def forgetting_table(study: Study) -> Table:
    """Return what arms of PaCA and each LoRA forget at equal test loss (rule 3)."""
    arms = arms_of(study)
    ours = filter(is_paca, arms)
    pairs = product(ours, [arm for arm in arms if arm.startswith(LORAS)])
    lines = {
        (a, b): forgotten(study, a, b, "general", sorted(arms[a].keys() & arms[b].keys()))
        for a, b in pairs
    }
    told = judged({pair: [a - b for _, a, b in by_seed] for pair, by_seed in lines.items()})
    cells = []
    for pair, difference in told.items():
        means = [f"{fmean(values):.3f}" for values in zip(*lines[pair], strict=True)]
        cells.append([*pair, *means, *_texts(difference)])
    header = ["arm", "against", "at a test loss of", "rise of the general loss", "the LoRA's"]
    return Table(header=[*header, "difference", "p", ""], cells=cells, num_index=2)


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
        tables = [differences_table(study, plans()[task]), arms_table(task, study, results)]
        if texts(study):
            tables.append(forgetting_table(study))
        yield from (f"\n{TASKS[task]}", *("\n" + "\n".join(t.markdown()) for t in tables))
    sums = {arm: costs[_KEPT_AT_8B][arm] + state for arm, state in costs[_STATE].items()}
    taken, others = default(tasks, sums)
    so_far = " so far" if missed else ""
    kept = f" ({format_bytes(sums[taken])} kept and in state at 8B)" if taken else ""
    yield f"\nDefault{so_far} (rule 4): {taken or 'none'}{kept}."
    yield from (f"- Not {arm} ({format_bytes(sums[arm])}): {why}." for arm, why in others.items())
    fate, better = fate_of_channels(tasks)
    where = [f"{arm} on {', '.join(map(TASKS.get, at)) or 'none'}" for arm, at in better.items()]
    yield f"`channels` {fate}{so_far} (rule 5): better than {_FIRST} is {'; '.join(where)}."


def block(task: str, results: Path = RESULTS) -> str:
    """Return the table of a task, for the docs."""
    return "\n".join(arms_table(task, studies(results)[task], results).markdown())


def at_8b(results: Path = RESULTS) -> dict[str, dict[str, float]]:
    """Return what arms keep for backward, and their state, of LLaMA3-8B, in bytes."""
    costs: dict[str, dict[str, float]] = {}
    for row in read("dial-cost", results).rows:
        costs.setdefault(row.what, {})[row.method] = row.value
    return costs


def cost_of_arms() -> list[Row]:
    """Return the same, by `pacatune estimate`."""
    rows = []
    for name, arm in plans()["minilm"].arms.items():  # which has all arms
        setting = Setting(
            model="llama3-8b",
            method=arm.method,
            rank=arm.rank or 0,
            channels=arm.options.get("paca", {}).get("channels"),
            seq_len=2048,
        )
        estimate = estimate_memory(setting)
        # Originals are in the adapter. The gradient is as large as each of the two moments.
        state = estimate.by_category["adapter"] + estimate.by_category["optimizer"] * 3 // 2
        for what, number in ((_KEPT_AT_8B, estimate.saved_bytes), (_STATE, state)):
            names = {"model": setting.model, "setting": f"{setting.seq_len:,} tokens"}
            rows.append(
                Row(what=what, method=name, value=number, unit="bytes", origin="simulated", **names)
            )
    return rows


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
            rate, seed = training["learning_rate"], training["seed"]
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
    add("--cost-of-arms", action="store_true", help="write dial-cost.json")
    args = parser.parse_args(options)
    if args.cost_of_arms:
        how = "what adapter, gradient, moments and kept columns take, and what backward needs"
        record("dial-cost", how, cost_of_arms, args, options)
    elif args.collect:
        collect(args.collect, args.output / "dial.csv")
    elif args.power:
        for task, study in studies(args.output).items():
            print(TASKS[task], "", *power_table(study, plans()[task]).markdown(), "", sep="\n")
    else:
        print(*said(args.output), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
