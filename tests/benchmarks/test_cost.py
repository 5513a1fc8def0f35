"""What arms keep, of a small model; and that the committed result has every arm."""

import json
from dataclasses import replace

import pytest

from benchmarks import cost, verdict
from benchmarks.results import read
from benchmarks.study_runs import KEPT
from experiments.study.config import merged, read_study
from experiments.study.tasks import StudyTask
from pacatune.training import train
from tests.data.conftest import write_lines


def test_arms_keep_in_turns_what_they_keep_in_training(tmp_path, tiny_model_dir, monkeypatch):
    write_lines(tmp_path / "data.jsonl", [{"prompt": "Why?", "completion": "So."}] * 20)
    data = str(tmp_path / "data.jsonl")
    options = {
        "model": {"path": str(tiny_model_dir)},
        "data": {"path": data, "eval_path": data},
        "training": {"use_cpu": True, "bf16": True},
    }
    shared = {"rank": 2, "learning_rates": [1e-3]}
    arms = {"paca": shared, "lora16": {**shared, "method": "lora"}}
    (tmp_path / "tiny.yaml").write_text(json.dumps({"options": options, "arms": arms}))
    plan = read_study(tmp_path / "tiny.yaml")
    monkeypatch.setattr(cost, "TASKS", ("tiny",))
    monkeypatch.setattr(cost, "plans", lambda: {"tiny": plan, "minilm": verdict.plans()["minilm"]})
    cost.main(["tiny", "--seconds", "0", "--min-rounds", "2", "--output", str(tmp_path)])
    rows = {(row.what, row.method): row for row in read("cost-tiny", tmp_path).rows}
    assert rows["step", "paca"].n == rows["step", "lora16"].n == 2
    # As in training: a step without autocast keeps float32 copies for LoRA.
    changes = {"model": {"dtype": "bfloat16"}, "training": {"max_steps": 1}}
    study = StudyTask(replace(plan, options=merged(options, changes)))
    for arm in arms:
        run = study.make_run(plan.arms[arm], 1e-3, seed=0, folder=tmp_path / arm)
        kept = train(run).saved_activation_bytes
        assert rows[KEPT, arm].value == pytest.approx(kept, abs=8)


def test_the_committed_results_have_every_arm_of_each_task():
    for task in cost.TASKS:
        there = {row.method for row in read(f"cost-{task}").rows if row.what == KEPT}
        assert there == verdict.plans()[task].arms.keys()


def test_costs_at_8b_are_those_that_are_committed(tmp_path):
    cost.main(["8b", "--output", str(tmp_path)])
    assert read("cost-8b", tmp_path).rows == read("cost-8b").rows


def test_a_task_without_a_name_is_said(capsys):
    with pytest.raises(SystemExit):
        cost.main(["cifar"])
    assert "no such task: cifar" in capsys.readouterr().err
