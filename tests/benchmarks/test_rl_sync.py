"""The benchmark of syncs: a small run is complete, and says of each method what must be so."""

import math

import pytest
import torch

from benchmarks import rl_methods, rl_sync, tables
from benchmarks.results import read

MODEL = rl_sync.MODEL


def test_a_small_run(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(rl_methods, "base_path", lambda: str(tiny_model_dir))
    monkeypatch.setattr(rl_methods, "RANK", 2)
    monkeypatch.setattr(rl_sync, "RANKS", (1, 3))
    rl_sync.main(["--quick", "--threads", "1", "--output", str(tmp_path)])
    # Nothing that was measured as a whole is overwritten.
    (tmp_path / "rl_sync-part.json").rename(tmp_path / "rl_sync.json")
    rows = read("rl_sync", tmp_path).rows
    found = {(row.what, row.method, row.model or row.setting): row.value for row in rows}

    # What is sent.
    sent = {
        row.method: row.value for row in rows if (row.what, row.model) == (rl_methods.SENT, MODEL)
    }
    assert sent.keys() == {*rl_methods.METHODS, "lora-adapter, r = 8"} - {"base"}
    assert sent["paca"] < found[rl_sync.COMPLETE, "paca", MODEL] < sent["lora-adapter"]
    assert sent["full"] == sent["lora"] == sent["swap"] > sent["lora-adapter"]
    assert found[rl_sync.COMPLETE, "paca", "llama3-8b"] == 2 * 2 * 43008 * 32
    assert found[rl_methods.SENT, "full", "llama3.1-70b"] == 2 * 70_553_706_496

    # Columns are the trainer's bits, after any number of syncs, and leave the base.
    same = {row.method: row.value for row in rows if row.what.endswith("bit for bit")}
    yes = {"paca", "lora-bf16"}
    assert same == {name: int(name in yes) for name in rl_sync.DRAWN if name != "base"}
    for rank in ("r = 1", "r = 3"):
        for number in (1, 5):
            what = f"largest difference, {number} syncs"
            assert found[what, "paca", rank] == 0
            assert found[what, "lora-adapter", rank] > 0
        changed = "changed elements of the base, 5 syncs"
        assert found[changed, "paca", rank] == found[changed, "lora-adapter", rank] == 0
        assert found[changed, "lora", rank] > 0

    drawn = {row.method for row in rows if row.what == "k3_kl"}
    assert drawn == {*rl_sync.DRAWN}
    assert all(row.n == 2 for row in rows if row.what == "k3_kl")
    for name in ("rl-served", "rl-drawn", "rl-sync"):
        assert "\n| paca |" in tables.block(name, tmp_path)


def test_how_far_a_sampler_is_from_its_trainer():
    """By the definitions of verl and TRL, written out."""
    drawn, trained = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.3, -2.0]])
    found = rl_methods.agreement(trained, drawn)
    assert found == pytest.approx(
        {
            "rollout_probs_diff, mean": (math.exp(-1) - math.exp(-1.3)) / 2,
            "rollout_probs_diff, max": math.exp(-1) - math.exp(-1.3),
            "sampling_logp_difference, mean": 0.15,
            "sampling_logp_difference, max": 0.3,
            "k3_kl": (math.exp(-0.3) - 1 + 0.3) / 2,
            "ratios beyond 0.8 to 1.25": 50.0,
        },
        rel=1e-5,
    )


def test_shares_measured_here_are_simulated_elsewhere():
    model = rl_sync.make_skeleton(rl_sync.load_config("llama3-8b"), "llama3-8b", torch.bfloat16)
    rows = rl_sync.count(model, "llama3-8b", 16, {"paca": 0.2, "elements": 0.5})
    origins = {(row.what, row.method): row.origin for row in rows}
    simulated = {key for key, origin in origins.items() if origin == "simulated"}
    assert simulated == {(rl_methods.SENT, "paca"), (rl_methods.SENT, "elements")}
