"""Tables of runs that are made up."""

import pytest

from benchmarks import study_runs
from experiments.study.statistics import compared


def runs_of(losses, *, rate=1e-3, kept=100.0, rise=1.0, validation=1.0, **more):
    """Runs of one rate, with the test losses of seeds 0, 1, ..."""
    return [
        {
            "learning rate": rate,
            "seed": float(seed),
            "validation loss": validation,
            "test loss": loss,
            "kept for backward, bytes": kept,
            "general loss before": 2.0,
            "general loss after": 2.0 + rise,
            **more,
        }
        for seed, loss in enumerate(losses)
    ]


NEAR = [0.50, 0.54, 0.46, 0.52, 0.48]


def less(by, noise=(0.0, 0.001, -0.001, 0.002, -0.002)):
    return [loss - by + more for loss, more in zip(NEAR, noise, strict=True)]


def test_arms_of_the_second_stage_ran_with_all_seeds():
    study = {"paca8": runs_of(NEAR), "lora8": runs_of(NEAR), "shira8": runs_of([0.1, 0.1])}
    assert [*study_runs.stage_two(study)] == ["paca8", "lora8"]


def test_forgetting_at_equal_loss_goes_along_the_frontier():
    part = {"test loss at 0.5": 0.8, "general loss at 0.5": 2.2}
    ours = runs_of([0.4], rise=1.0, **part) + runs_of([0.6], rate=2e-3, rise=2.0)  # is beaten
    theirs = runs_of([0.6], rise=3.0)
    study = {"paca8": ours, "lora8": theirs}
    # Halfway between (0.4, 1.0) and (0.8, 0.2), and 3.0 of LoRA at its own.
    (found,) = study_runs.forgotten(study, "paca8", "lora8", "general", [0])
    assert found == pytest.approx((0.6, 0.6, 3.0))


def test_what_is_reached_and_told_is_a_matrix_of_arms_and_tasks():
    more = {"test accuracy": 0.9}
    arms = {"paca16": runs_of(NEAR, **more), "lora16": runs_of(less(0.1), **more)}
    by_seed = {arm: {int(run["seed"]): run for run in runs} for arm, runs in arms.items()}
    some = {"lora16": by_seed["lora16"]}
    lines = study_runs.reached({"minilm": by_seed, "smollm2-sort": some}).markdown()
    assert lines[0] == "| arm | MiniLM-L6 | SmolLM2-135M, words sorted |"
    assert lines[2:] == [
        "| `paca16` | 0.500 ± 0.039; 90.0 % | - |",
        "| `lora16` | 0.400 ± 0.041; 90.0 % | 0.400 ± 0.041; 90.0 % |",
    ]
    found = compared(by_seed, [("paca16", "lora16")])
    lines = study_runs.told({"minilm": found, "smollm2-sort": {}}).markdown()
    assert lines[2:] == ["| `paca16` minus `lora16` | +0.100 ± 0.002, **worse** | - |"]


def test_forgetting_is_corrected_over_all_of_its_table():
    rises = {"paca16": 1.0, "lora16": 1.4, "rslora16": 1.2}
    study = {arm: runs_of(NEAR, rise=rise) for arm, rise in rises.items()}
    for runs in study.values():
        for run, more in zip(runs, (0.0, 0.01, -0.01, 0.02, -0.02), strict=True):
            run["general loss after"] += 0.0 if runs is study["paca16"] else more
    lines = study_runs.forgetting({"minilm": study}, ["paca16", "c64"]).splitlines()
    assert lines[2] == "| MiniLM-L6 | general | `lora16` | -0.400 ± 0.020, **better** | - |"
    assert lines[3].startswith("| MiniLM-L6 | general | `rslora16` | -0.200")
    assert "The mean is less in 2 of 2 comparisons; **2 of them are significant**" in lines[5]
