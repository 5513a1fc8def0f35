import asyncio
import math

import numpy as np
import pytest
import torch

from pacatune.data import PromptDataConfig
from pacatune.training.rewards import RewardError, check_rewards, checked, load_rewards

PLACES = ["d.jsonl, row 1", "d.jsonl, row 2"]
DATA = PromptDataConfig(path="d.jsonl")


def load(name, columns=("prompt", "place", "number")):
    (reward,) = load_rewards([name], DATA, columns)
    return reward


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of rewards into the current folder."""
    import sys

    monkeypatch.chdir(tmp_path)

    def write(text, name="rewards_here"):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    yield write
    sys.modules.pop("rewards_here", None)


def test_a_function_gets_every_column(module):
    module("def f(completions, number, **kwargs):\n    return [n + len(kwargs) for n in number]\n")
    reward = load("rewards_here:f")
    assert reward.__name__ == "rewards_here.f"
    found = reward(place=PLACES, prompts=["a", "b"], completions=["x", "y"], number=[1, 2])
    assert found == [2.0, 3.0]  # without `place`, which is for messages


def test_a_coroutine_function_is_awaited(module):
    from trl.trainer.utils import is_async_callable

    module("async def f(completions, **kwargs):\n    return [1 for _ in completions]\n")
    reward = load("rewards_here:f")
    assert is_async_callable(reward)
    assert asyncio.run(reward(place=PLACES, completions=["a", "b"])) == [1.0, 1.0]
    module("async def f(completions, **kwargs):\n    raise OSError('gone')\n")
    with pytest.raises(RewardError, match=r"'rewards_here:f' raised OSError \(gone\) on 2 answers"):
        asyncio.run(load("rewards_here:f")(place=PLACES, completions=["a", "b"]))


@pytest.mark.parametrize(
    ("rewards", "found"),
    [
        ([1, 0.5], [1.0, 0.5]),
        ((True, None), [1.0, None]),
        (np.array([1.0, 2.0]), [1.0, 2.0]),
        (torch.tensor([1, 2]), [1.0, 2.0]),
        ([torch.tensor(3.0), np.float32(0.5)], [3.0, 0.5]),
    ],
)
def test_numbers_of_any_kind(rewards, found):
    assert check_rewards("f", rewards, PLACES) == found


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (
            None,
            r"'f' returned None \(.*not iterable\); it must return a list of 2 numbers, or None",
        ),
        (1.0, r"'f' returned 1.0 \(.*; it must return a list"),
        ([1.0], "'f' returned a list of 1; it must return a list of 2 numbers, or None where"),
        ([1.0, 2.0, 3.0], "'f' returned a list of 3"),
        ([1.0, math.nan], "'f' returned nan for d.jsonl, row 2; it must return"),
        ([-math.inf, 1.0], "'f' returned -inf for d.jsonl, row 1"),
        ([1.0, "good"], r"'f' returned \[1.0, 'good'\] \(could not convert"),
        ([[1.0], 2.0], r"'f' returned \[\[1.0\], 2.0\]"),
    ],
)
def test_what_are_no_rewards(rewards, message):
    with pytest.raises(RewardError, match=message):
        check_rewards("f", rewards, PLACES)


def test_an_error_names_function_and_prompt():
    def fail(completions, **kwargs):
        return 1 / 0

    with pytest.raises(
        RewardError,
        match=r"reward 'm:f' raised ZeroDivisionError \(division by zero\) on 2 answers \(d.jsonl, "
        r"row 1 is the first\)\.",
    ):
        checked("m:f", fail)(place=PLACES, completions=["a", "b"])


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "rewards_here:g", r"raised AttributeError \(module 'rewards_here' has no attribute"),
        ("g = 1", "rewards_here:g", r"cannot be called with prompts, .*\(1 is not a callable"),
        ("", "nosuch_module:g", r"module:name, of a module in .* or installed.*'nosuch_module'"),
        ("", "short", r"`reward` \('short'\) must be a Python function as module:name"),
        ("1 / 0", "rewards_here:g", r"importing it raised ZeroDivisionError"),
        ("def g(completions): ...", "rewards_here:g", r"cannot be called with prompts, .*\*\*kwar"),
        ("def g(answer, **kwargs): ...", "rewards_here:g", r"missing a required .*'answer'"),
    ],
)
def test_functions_that_cannot_be_used(module, text, name, message):
    module(text)
    with pytest.raises(ValueError, match=message):
        load(name)


class TestVerifier:
    @pytest.fixture(autouse=True)
    def is_installed(self):
        pytest.importorskip("reasoning_gym")

    def test_scores(self):
        from pacatune.data.prompts import INDEX, reasoning_gym_data

        config = PromptDataConfig(path="reasoning-gym:chain_sum", size=5)
        (reward,) = load_rewards([config.path], config, ["prompt", "place", "answer", INDEX])
        assert reward.__name__ == "reasoning-gym.chain_sum"
        answer = reasoning_gym_data(config)[3]["answer"]

        def score(text, index=3):
            return reward(place=["x"], completions=[text], **{INDEX: [index]})[0]

        assert score(answer) == 1
        assert score(f"I say 7. <answer>0</answer> No: <answer> {answer} </answer>") == 1
        assert score([{"role": "assistant", "content": answer}]) == 1
        assert 0 <= score(f"It is {answer}, or so.") < 1
        assert score("") < 0.1
        assert score(answer, index=2) < 1

    def test_what_a_verifier_cannot_read_scores_nothing(self):
        """The verifier of complex numbers, among others, raises what it pleases."""
        from pacatune.data.prompts import INDEX
        from pacatune.training.rewards import make_verifier

        verify = make_verifier(PromptDataConfig(path="reasoning-gym:chain_sum", size=5))
        assert verify([[{"content": "1"}]], **{INDEX: [99]}) == [0.0]  # no such example
