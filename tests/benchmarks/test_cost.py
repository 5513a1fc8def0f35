"""What arms keep, of a small model; and that the committed result has every arm that exists."""

import json

import pytest

from benchmarks import cost
from benchmarks.results import read
from benchmarks.verdict import KEPT, stage_two, studies
from experiments.study.config import read_study
from tests.data.conftest import write_lines


def test_arms_that_exist_train_one_step(tmp_path, tiny_model_dir, monkeypatch):
    write_lines(tmp_path / "data.jsonl", [{"prompt": "Why?", "completion": "So."}] * 20)
    data = str(tmp_path / "data.jsonl")
    options = {
        "model": {"path": str(tiny_model_dir)},
        "data": {"path": data, "eval_path": data},
        "training": {"use_cpu": True, "bf16": True},
    }
    shared = {"rank": 2, "learning_rates": [1e-3]}
    arms = {"paca": shared, "lora16": {**shared, "method": "lora"}}
    plan = {"options": options, "arms": arms}
    (tmp_path / "tiny.yaml").write_text(json.dumps(plan))
    runs = [{"seed": 0.0, "learning rate": 1e-3, "validation loss": 1.0}]
    monkeypatch.setattr(cost, "FOLDER", tmp_path)
    monkeypatch.setattr(cost, "TASKS", ("tiny",))
    arms = dict.fromkeys(("paca", "pool", "lora16"), runs)
    monkeypatch.setattr(cost, "studies", lambda: {"tiny": arms})
    cost.main(["--output", str(tmp_path)])
    kept = {row.method: row.value for row in read("cost-kept", tmp_path).rows}
    assert [*kept] == ["paca", "lora16"]
    assert 0 < kept["paca"] < kept["lora16"]
    # Those of the dial take turns.
    monkeypatch.setattr(cost, "DIAL", ("tiny",))
    monkeypatch.setattr(cost, "plans", lambda: {"tiny": read_study(tmp_path / "tiny.yaml")})
    cost.main(["--dial", "--seconds", "0", "--min-rounds", "2", "--output", str(tmp_path)])
    rows = {(row.what, row.method): row for row in read("dial-steps", tmp_path).rows}
    # As in training: a step without autocast keeps float32 copies for LoRA.
    assert {arm: rows[KEPT, arm].value for arm in kept} == pytest.approx(kept, abs=8)
    assert rows["step", "paca"].n == rows["step", "lora16"].n == 2


def test_the_committed_result_has_every_arm_that_exists():
    rows = read("cost-kept").rows
    assert {row.what for row in rows} == {KEPT}
    for task in cost.TASKS:
        arms = [arm for arm in stage_two(studies()[task]) if arm not in ("pool16", "spread16")]
        assert [row.method for row in rows if row.setting == task] == arms
