"""GRPO beside a sampler: a small run has every row, and the loss is GRPO's."""

import math

import pytest
import torch

from benchmarks import rl
from benchmarks.results import read

pytest.importorskip("reasoning_gym")


def test_a_small_run(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(rl, "sft", lambda folder, seed: str(tiny_model_dir))
    monkeypatch.setattr(rl, "RANK", 2)
    # No random model reverses words; what it is rewarded for here, it can learn.
    monkeypatch.setattr(rl.Problems, "rewards", lambda _, p, ids, m: (ids % 2).float().mean(1))
    words = ["--steps", "4", "--seeds", "2", "--threads", "1"]
    words += ["--output", str(tmp_path), "--work", str(tmp_path / "work")]
    rl.main([*words, "--methods", "lora"])
    kept = read("rl_run-part", tmp_path).rows
    run = rl.run

    def no_lora(method, *options):
        assert method != "lora"  # which is not trained again
        return run(method, *options)

    monkeypatch.setattr(rl, "run", no_lora)
    rl.main(words)
    rows = read("rl_run-part", tmp_path).rows
    assert all(row in rows for row in kept)
    by_name = {(row.what, row.method): row for row in rows}
    for method in rl.METHODS:
        for part in range(1, 5):
            reward = by_name[f"reward, steps {part} to {part}", method]
            assert 0 < reward.value < 1
            assert set(reward.each) == {"seed 0", "seed 1"}
        assert by_name["k3_kl", method].value >= 0
        assert by_name["sync", method].value > 0
    sent = {method: by_name[rl.SENT, method].value for method in rl.METHODS}
    assert 0 < sent["paca"] < sent["lora-adapter"] < sent["lora"]
    assert sent["paca"] < by_name["complete sync", "paca"].value
    # The sampler multiplies with the trainer's bits, where a merge or an adapter rounds.
    far = {method: by_name["largest difference, scored anew", method].value for method in sent}
    assert far["paca"] == 0 < min(far["lora"], far["lora-adapter"])


def test_how_far_a_sampler_is_from_its_trainer():
    """By the definitions of verl and TRL, written out."""
    drawn, trained = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.3, -2.0]])
    assert rl.agreement(trained, drawn) == pytest.approx(
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


def test_the_loss_is_that_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    logps = (-torch.rand(4, 3, generator=generator)).requires_grad_()
    rewards, mask = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.ones(4, 3, dtype=torch.bool)
    mask[1, 2] = False
    rl.grpo_loss(logps, rewards, mask).backward()
    # Of two answers the better one is half a standard deviation above the mean, times sqrt(2).
    advantage = 0.5 / (0.5**0.5 + 1e-4)
    by_hand = -torch.tensor([advantage, -advantage, 0.0, 0.0])[:, None] * mask / mask.sum()
    torch.testing.assert_close(logps.grad, by_hand)


def test_problems_are_of_one_length(tiny_model_dir):
    problems = rl.Problems(str(tiny_model_dir), seed=1)
    some, prompts = problems.batch(3)
    assert len(some) == len(prompts) == 32
    assert (prompts[0] == prompts[7]).all()
    assert (prompts[0] != prompts[8]).any()
    answer = problems.tokenizer(some[0]["answer"], add_special_tokens=False)["input_ids"]
    answers = torch.tensor([answer, answer])
    mask = torch.tensor([[True] * len(answer), [True] + [False] * (len(answer) - 1)])
    right, wrong = problems.rewards(some[:2], answers, mask).tolist()
    assert (right, wrong < 1) == (1.0, True)
