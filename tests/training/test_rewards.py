import asyncio
import math
import sys

import numpy as np
import pytest
import torch
from trl.trainer.utils import is_async_callable

from pacatune.training.rewards import RewardError, checked, load_rewards

PLACES = ["d.jsonl, row 1", "d.jsonl, row 2"]
TWO = {"place": PLACES, "completions": ["a", "b"]}


@pytest.fixture
def load(rewards_module, tmp_path, monkeypatch):
    """Load a reward of the module, which has this text."""

    def write(text, name=f"{rewards_module}:f"):
        (tmp_path / f"{rewards_module}.py").write_text(text)
        monkeypatch.delitem(sys.modules, rewards_module, raising=False)
        (reward,) = load_rewards([name])
        return reward

    return write


def test_a_function_gets_every_column(load):
    text = "def f(completions, number, **kwargs):\n    return [n + len(kwargs) for n in number]\n"
    reward = load(text)
    assert reward.__name__ == "my_rewards.f"
    found = reward(prompts=["a", "b"], number=[1, 2], **TWO)
    assert found == [2.0, 3.0]  # without `place`, which is for messages


def test_a_coroutine_function_is_awaited(load):
    reward = load("async def f(completions, **kwargs):\n    return [1 for _ in completions]\n")
    assert is_async_callable(reward)
    assert asyncio.run(reward(**TWO)) == [1.0, 1.0]
    reward = load("async def f(completions, **kwargs):\n    raise OSError('gone')\n")
    raised = (
        r"'my_rewards:f' raised OSError \(gone\) on 2 answers \(d.jsonl, row 1 is the first\)\."
    )
    with pytest.raises(RewardError, match=raised):
        asyncio.run(reward(**TWO))


def test_numbers_of_any_kind():
    for rewards, found in (
        ([1, 0.5], [1.0, 0.5]),
        ((True, None), [1.0, None]),
        (np.array([1.0, 2.0]), [1.0, 2.0]),
        (torch.tensor([1, 2]), [1.0, 2.0]),
        ([torch.tensor(3.0), np.float32(0.5)], [3.0, 0.5]),
    ):
        assert checked("f", lambda *, of=rewards, **_: of)(**TWO) == found


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (None, r"'f' raised TypeError \('NoneType' object is not iterable\) on 2 answers"),
        ([1.0], r"it returned \[1.0\], and must return a list of 2 numbers, or None where it"),
        ([1.0, math.nan], r"it returned \[1.0, nan\], and must return"),
        ([1.0, "good"], r"'f' raised ValueError \(could not convert"),
    ],
)
def test_what_are_no_rewards(rewards, message):
    with pytest.raises(RewardError, match=message):
        checked("f", lambda **_: rewards)(**TWO)


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("g = 1", "my_rewards:g", r"reward 'my_rewards:g' is 1; it must be a function"),
        ("", "nosuch_module:g", r"module:name, of a module in .* or installed.*'nosuch_module'"),
        ("", "short", r"`reward` \('short'\) must be a Python function as module:name"),
        ("1 / 0", "my_rewards:g", r"importing it raised ZeroDivisionError"),
    ],
)
def test_functions_that_cannot_be_used(load, text, name, message):
    with pytest.raises(ValueError, match=message):
        load(text, name)
