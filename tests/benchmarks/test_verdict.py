"""The rules of the study at equal cost, on runs that are made up."""

import csv
import json

import pytest

from benchmarks import verdict


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


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)


NEAR = [0.50, 0.54, 0.46, 0.52, 0.48]


def less(by, noise=(0.0, 0.001, -0.001, 0.002, -0.002)):
    return [loss - by + more for loss, more in zip(NEAR, noise, strict=True)]


def test_two_of_paca_are_compared_once_with_each_arm_that_ran_with_all_seeds():
    study = {"paca8": runs_of(NEAR), "spread16": runs_of(less(0.1)), "lora8": runs_of(NEAR)}
    study["paca16"] = runs_of(NEAR, validation=2.0, kept=150.0)
    study["shira8"] = runs_of([0.1, 0.1])  # left after the first stage
    pairs = [("paca8", "spread16"), ("paca8", "lora8"), ("spread16", "lora8")]
    assert list(verdict.compared(study)) == pairs
    assert verdict.compared(study)["paca8", "spread16"].said == "worse"


def test_forgetting_at_equal_loss_goes_along_the_frontier():
    part = {"test loss at 0.5": 0.8, "general loss at 0.5": 2.2}
    ours = runs_of([0.4], rise=1.0, **part) + runs_of([0.6], rate=2e-3, rise=2.0)  # is beaten
    theirs = runs_of([0.6], rise=3.0)
    study = {"paca8": ours, "lora8": theirs}
    # Halfway between (0.4, 1.0) and (0.8, 0.2), and 3.0 of LoRA at its own.
    (found,) = verdict.forgotten(study, "paca8", "lora8", "general", [0])
    assert found == pytest.approx((0.6, 0.6, 3.0))


@pytest.fixture
def results(tmp_path):
    """PaCA of r = 8 is worse than LoRA, which keeps more, and better than DoRA, which has 1.0."""
    more = {"test accuracy": 0.9}
    study = {"paca8": runs_of(NEAR, **more), "lora8": runs_of(less(0.1), kept=200.0, **more)}
    study["lora8"] += runs_of(less(0.1), rate=2e-3, validation=2.0, rise=3.0, kept=200.0, **more)
    study["dora8"] = runs_of(less(-0.1), kept=50.0, validation=0.5, **more)
    study["rslora8"] = runs_of(NEAR[:2], **more)  # left after the first stage
    rows = [
        {"study": "cost-minilm", "arm": arm, **run} for arm, runs in study.items() for run in runs
    ]
    write(tmp_path / "cost.csv", rows)
    steps = [
        {"what": "step", "method": arm, "value": ms, "unit": "ms"}
        for arm, ms in (("paca8", 10.0), ("lora8", 15.0), ("dora8", 15.0), ("rslora8", 15.0))
    ]
    share = {"what": "step", "method": "lora8 / paca8", "value": 1.5, "unit": "ratio"}
    (tmp_path / "cost-minilm.json").write_text(json.dumps({"rows": [*steps, share]}))
    return tmp_path


def test_bytes_are_counted_anew_where_training_has_autocast(results):
    study = verdict.studies(results)["minilm"]
    for task, kept in {
        "dinov2": {"paca8": 100.0, "lora8": 200.0, "dora8": 50.0},
        "minilm": {"paca8": 60.0},
    }.items():
        row = {"what": "kept", "method": "paca8", "value": 60.0, "setting": task}
        (results / "cost-kept.json").write_text(json.dumps({"rows": [row]}))
        assert verdict.kept_in("minilm", study, results) == kept
    assert verdict.steps_of("minilm", results)["lora8"] == 15.0
