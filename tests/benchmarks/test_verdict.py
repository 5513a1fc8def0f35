"""The rules of the study of the dial, on runs that are made up and judged by hand."""

import json
import math

import pytest

from benchmarks import cost, tables, verdict
from benchmarks.verdict import default, differences, fate_of_channels, studies
from experiments.study.statistics import read_runs

BASE = [0.50, 0.54, 0.46, 0.52, 0.48]
STEPS = [-0.02, -0.01, 0.0, 0.01, 0.02]
"""Their standard error is 0.01 / sqrt(2)."""


def runs(by=0.0, sign=1, rise=1.0, seeds=5, **more):
    """Runs whose test loss is less than `BASE` by some number; `STEPS` up or down in all."""
    usual = {"learning rate": 1e-3, "validation loss": 1.0}
    return [
        {
            **usual,
            "seed": float(seed),
            "test loss": BASE[seed] - by + sign * STEPS[seed],
            "test accuracy": 0.9,
            "general loss before": 2.0,
            "general loss after": 2.0 + rise + sign * STEPS[seed],
            **more,
        }
        for seed in range(seeds)
    ]


PACA16 = runs(sign=0, rise=3.0)
BETTER = runs(0.1)
TASK = {
    "paca16": PACA16,
    "c64": runs(0.1),
    "lora16": runs(0.11, -1, 3.0),
}
EVERY = ("minilm", "dinov2-digits", "smollm2-words", "smollm2-sort")


def p_of(t):
    """Return the two-sided p of Student's t with four degrees of freedom, in closed form."""
    angle = math.atan(t / 2)
    return 1 - math.sin(angle) * (1 + math.cos(angle) ** 2 / 2)


@pytest.fixture
def results(tmp_path):
    """Runs of one task of four, in a folder of a study, and costs at 8B; one run has failed."""
    jobs = tmp_path / "dial-minilm" / "jobs"
    jobs.mkdir(parents=True)
    for arm, some in (TASK | {"rslora16": PACA16[:1]}).items():
        for run in some:
            training = {"learning_rate": run["learning rate"], "seed": int(run["seed"])}
            rows = [
                {"what": what, "method": arm, "value": value}
                for what, value in run.items()
                if what not in ("learning rate", "seed")
            ]
            job = {"inputs": {"run": {"training": training}}, "rows": rows}
            job["provenance"] = {"seconds": 5.0}
            (jobs / f"{arm}-{run['seed']}.json").write_text(json.dumps(job))
    (jobs / "c32-0.json").write_text(json.dumps({**job, "rows": [], "error": "diverged"}))
    at_8b = {"paca16": (5.0, 8.0), "c64": (6.0, 9.0), "lora16": (20.0, 7.0)}
    rows = [
        {"what": what, "method": arm, "value": value, "unit": "bytes"}
        for arm, values in at_8b.items()
        for what, value in zip(("kept for backward", "state"), values, strict=True)
    ]
    measured = {"paca16": (10.0, 30.0), "c64": (20.0, 20.0), "lora16": (100.0, 10.0)}
    (tmp_path / "cost-8b.json").write_text(json.dumps({"rows": rows}))
    rows = [
        {"what": what, "method": arm, "value": value}
        for arm, values in measured.items()
        for what, value in zip(("kept for backward, bytes", "step"), values, strict=True)
    ]
    for task in cost.TASKS:
        (tmp_path / f"cost-{task}.json").write_text(json.dumps({"rows": rows}))
    verdict.main(["--collect", str(jobs.parent), "--output", str(tmp_path)])
    return tmp_path


def test_runs_are_collected_and_arms_of_two_seeds_count(results):
    collected = read_runs(results / "dial.csv")["dial-minilm"]
    assert collected["c64"] == [{**run, "seconds": 5.0} for run in TASK["c64"]]
    assert "c32" not in collected
    # Others come beside them; the machine that made the first need not be there.
    (results / "dial-dinov2-digits").mkdir()
    verdict.collect([results / "dial-dinov2-digits"], results / "dial.csv")
    assert read_runs(results / "dial.csv")["dial-minilm"] == collected
    (study,) = studies(results).values()
    assert [*study] == ["paca16", "c64", "lora16", "rslora16"]  # as planned
    assert [*verdict.arms_of(study)] == ["paca16", "c64", "lora16"]


def test_all_seeds_are_there_when_no_task_lacks_one():
    tasks = dict.fromkeys(EVERY, TASK)
    assert verdict.has_all_seeds(tasks, "paca16", "lora16")
    assert not verdict.has_all_seeds(tasks | {"minilm": TASK | {"lora16": runs(seeds=4)}}, "lora16")
    assert not verdict.has_all_seeds(dict.fromkeys(EVERY[:3], TASK), "paca16")


def test_each_arm_is_compared_once_with_each_reference():
    told = differences(TASK)
    assert [*told] == [("paca16", "lora16"), ("c64", "paca16"), ("c64", "lora16")]
    assert [d.said for d in told.values()] == ["worse", "better", "no significant difference"]
    assert told["c64", "paca16"].mean == pytest.approx(-0.1)
    assert told["c64", "paca16"].half_interval == pytest.approx(2.776 * 0.01 / math.sqrt(2))
    error = 0.01 / math.sqrt(2)
    first, second = p_of(0.11 / error), p_of(0.1 / error)
    by_holm = [3 * first, max(3 * first, 2 * second), p_of(0.01 / (2 * error))]
    assert [d.p for d in told.values()] == pytest.approx(by_holm)
    # Of unequal seeds those that both have.
    (pair,) = differences({"paca16": PACA16, "c64": BETTER[:3]}).values()
    assert pair.mean == pytest.approx(-0.11)


def test_three_seeds_foresee_the_interval_of_five():
    plan = verdict.plans()["minilm"]
    foreseen = verdict.power(TASK, plan)
    # 0.01 apart each; t of 4 degrees of freedom at 0.05, and at a third of it.
    half, strict = foreseen["c64", "paca16"]
    assert half == pytest.approx(2.776 * 0.01 / math.sqrt(5), rel=1e-3)
    assert strict == pytest.approx(3.961 * 0.01 / math.sqrt(5), rel=1e-3)
    assert foreseen["c64", "lora16"][0] == pytest.approx(2 * half)
    assert verdict.power({"paca16": PACA16, "c64": BETTER[:2]}, plan) == {}


def test_what_is_said_of_one_task(results, capsys):
    verdict.main(["--output", str(results)])
    lines = capsys.readouterr().out.splitlines()
    few = "paca64 0, c32 0, c8th 0, c4th 0, call 0, lora8 0, rslora16 1"
    assert lines[0] == f"Missing: MiniLM-L6, types of questions: fewer than 5 seeds: {few}."
    assert lines[1] == "Missing: DINOv2-S, digits: no arm has two seeds."
    assert "| c64 | paca16 | 5 | -0.100 ± 0.020 | 0.0003 | better | 0.012 |" in lines
    known = "+0.010 ± 0.039 | 0.52 | no significant difference | 0.025 |"
    assert f"| c64 | lora16 | 5 | {known}" in lines
    # Of a step and of state, lora16 costs least and is best.
    assert "| `c64` | 0.400 ± 0.038; 90.0 % |" in lines
    assert "| `c64` minus `lora16` | +0.010 ± 0.039 |" in lines
    sizes = "20 B; 2.00 | 20 B; 2.00 | 20 B; 2.00 | 6 B | 9 B |"
    assert f"| `c64` | {sizes}" in lines
    assert "| MiniLM-L6 | `paca16`, `c64`, `lora16` | `lora16` | `lora16` |" in lines
    rises = "| MiniLM-L6 | general | `lora16` |"
    assert f"{rises} +0.000 ± 0.020 | -2.000 ± 0.039, **better** | - |" in lines
    assert lines[-3] == "Default so far (rule 4): c64 (15 B kept and in state at 8B)."
    assert lines[-2] == "- Not paca16 (13 B): worse than c64 on MiniLM-L6, types of questions."
    better = "c64 on MiniLM-L6, types of questions; c8th on none"
    assert lines[-1] == f"`channels` is open so far (rule 5): better than paca16 is {better}."
    verdict.main(["--power", "--output", str(results)])
    assert "| c64 | paca16 | 0.012 | 0.018 |" in capsys.readouterr().out
    table = tables.block("dial-reached", results).splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| `paca16`", "| `c64`", "| `lora16`"]


def test_without_runs_all_is_missing(results, capsys):
    (results / "dial.csv").unlink()
    verdict.main(["--output", str(results)])
    *lines, taken, fate = filter(None, capsys.readouterr().out.splitlines())
    assert len(lines) == 4
    assert taken == "Default so far (rule 4): none."
    assert fate.startswith("`channels` is open so far (rule 5)")


def test_the_default_is_the_cheapest_that_is_worse_nowhere():
    equal = {"c64": runs(), "paca64": runs(0, -1), "paca16": PACA16}
    tasks = {
        "minilm": equal,
        "dinov2-digits": {arm: equal[arm] for arm in ("c64", "paca64", "paca16")},
    }
    costs = {"paca16": 3.0, "paca64": 2.0, "c64": 2.0}
    reason = "costs as much or more"
    assert default(tasks, costs) == ("paca64", {"c64": reason, "paca16": reason})  # a tie
    assert default(tasks, costs | {"c64": 1.0})[0] == "c64"
    # Worse on one task, and not run on one; LoRA is no arm of PaCA, and none is compared with it.
    tasks["dinov2-digits"] = {"paca16": PACA16, "c64": BETTER, "lora16": runs(0.3)}
    taken, others = default(tasks, costs)
    assert taken == "c64"
    assert others["paca16"] == "worse than c64 on DINOv2-S, digits"
    assert others["paca64"] == "not run on DINOv2-S, digits"
    tasks["minilm"] = {"paca16": BETTER, "c64": PACA16}
    assert default(tasks, costs)[0] is None


def test_channels_leave_unless_one_arm_is_better_on_two_tasks():
    same, better = ({"paca16": PACA16, "c64": runs(), "c8th": some} for some in (runs(), BETTER))
    tasks = dict.fromkeys(EVERY, same) | {"dinov2-digits": better}
    assert fate_of_channels(tasks) == ("leaves", {"c64": [], "c8th": ["dinov2-digits"]})
    # One task of each arm is not two of one.
    other = {"paca16": PACA16, "c64": BETTER, "c8th": runs()}
    assert fate_of_channels(tasks | {"minilm": other})[0] == "leaves"
    assert fate_of_channels(tasks | {"minilm": better})[0] == "stays"
    # A task, or the arm on it, that is missing could decide; two that are there have decided.
    few = {task: tasks[task] for task in EVERY[:3]}
    assert fate_of_channels(few)[0] == "is open"
    assert fate_of_channels(tasks | {"minilm": {"paca16": PACA16, "c64": runs()}})[0] == "is open"
    assert fate_of_channels(few | {"minilm": better})[0] == "stays"


def test_frontiers_have_what_nothing_beats():
    costs = {"a": 1.0, "b": 2.0, "c": 2.0, "d": 3.0, "e": 1.0}
    losses = {"a": 0.5, "b": 0.4, "c": 0.45, "d": 0.4, "e": 0.5}
    assert verdict.frontier(costs, losses) == {"a", "b", "e"}


def test_losses_are_means_over_the_seeds_that_all_arms_have():
    losses = verdict.losses_of(verdict.arms_of({"paca16": PACA16, "c64": BETTER[:2]}))
    assert losses == {"paca16": BASE[:2], "c64": pytest.approx([0.38, 0.43])}


def test_the_committed_costs_are_of_all_arms_and_follow_from_their_sizes():
    costs = verdict.at_8b()
    assert all(values.keys() == verdict.plans()["minilm"].arms.keys() for values in costs.values())
    outputs = 32 * (4 * 4096 - 2 * 3072 + 2 * 14336 + 4096)  # of all linear layers of LLaMA3-8B
    # A column: four numbers of float32 for each output, and an original of bfloat16.
    assert costs["state"]["paca16"] == pytest.approx(16 * outputs * (4 * 4 + 2), rel=1e-3)
    kept = costs["kept for backward"]
    # 16 bits of each token and column; what down reads is made again (benchmarks/lean.py).
    assert kept["paca64"] - kept["paca16"] == 2048 * 2 * 32 * 6 * (64 - 16)
