"""GRPO beside a sampler: a small run has every row, and the loss is GRPO's."""

from functools import partial

import pytest
import torch

from benchmarks import rl_methods, rl_run
from benchmarks.results import read

pytest.importorskip("reasoning_gym")


def no_lora(run, method, *options):
    assert method != "lora"
    return run(method, *options)


def test_a_small_run(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(rl_methods, "base_path", lambda: str(tiny_model_dir))
    monkeypatch.setattr(rl_methods, "RANK", 2)
    # No random model reverses words; what it is rewarded for here, it can learn.
    monkeypatch.setattr(rl_run.Problems, "rewards", lambda _, p, ids, m: (ids % 2).float().mean(1))
    options = ["--steps", "4", "--seeds", "2", "--start", str(tiny_model_dir), "--threads", "1"]
    options += ["--output", str(tmp_path), "--runs", str(tmp_path)]
    rl_run.main([*options, "--methods", "lora"])
    (kept,) = read("rl_run-part", tmp_path).rows[:1]
    monkeypatch.setattr(rl_run, "run", partial(no_lora, rl_run.run))
    rl_run.main(options)
    assert kept in read("rl_run-part", tmp_path).rows  # which was not trained again
    found = {(row.what, row.method): row for row in read("rl_run-part", tmp_path).rows}
    for method in rl_run.METHODS:
        for part in range(1, 5):
            reward = found[f"reward, steps {part} to {part}", method]
            assert 0 < reward.value < 1
            assert set(reward.each) == {"seed 0", "seed 1"}
        assert found["k3_kl", method].value >= 0
    sent = {method: found[rl_methods.SENT, method].value for method in rl_run.METHODS}
    assert 0 < sent["paca, 1e-4"] < sent["paca"] < sent["lora-adapter"] < sent["lora"]


def test_fewer_steps_than_parts():
    rows = list(rl_run.rows_of("paca", "vLLM", {"seed 0": {"reward": [0.25, 0.75]}}, 2))
    assert {row.what: row.value for row in rows} == {
        "reward, steps 1 to 1": 0.25,
        "reward, steps 2 to 2": 0.75,
    }


def test_the_loss_is_that_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    logps = (-torch.rand(4, 3, generator=generator)).requires_grad_()
    rewards, mask = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.ones(4, 3, dtype=torch.bool)
    mask[1, 2] = False
    rl_run.grpo_loss(logps, rewards, mask).backward()
    # Of two answers the better one is half a standard deviation above the mean, times sqrt(2).
    advantage = 0.5 / (0.5**0.5 + 1e-4)
    by_hand = -torch.tensor([advantage, -advantage, 0.0, 0.0])[:, None] * mask / mask.sum()
    torch.testing.assert_close(logps.grad, by_hand)


def test_problems_are_of_one_length(tiny_model_dir):
    problems = rl_run.Problems(str(tiny_model_dir), seed=1)
    some, prompts = problems.batch(3)
    assert len(some) == len(prompts) == 32
    assert (prompts[0] == prompts[7]).all()
    assert (prompts[0] != prompts[8]).any()
    answer = problems.tokenizer(some[0]["answer"], add_special_tokens=False)["input_ids"]
    answers = torch.tensor([answer, answer])
    mask = torch.tensor([[True] * len(answer), [True] + [False] * (len(answer) - 1)])
    right, wrong = problems.rewards(some[:2], answers, mask).tolist()
    assert (right, wrong < 1) == (1.0, True)
