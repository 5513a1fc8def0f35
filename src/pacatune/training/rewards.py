"""Rewards of answers: Python functions and reasoning-gym's verifiers, and checks of what they say.

A reward function is TRL's: called with `prompts`, `completions`, `completion_ids` and every column
of the data, all of them lists with one entry per answer, it returns as many numbers, None where it
says nothing.
"""

import math
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from trl.trainer.utils import is_async_callable

from pacatune.data.config import PromptDataConfig
from pacatune.data.prompts import INDEX, reasoning_gym_data
from pacatune.training.config import reward_name


class RewardError(ValueError):
    """A reward function failed, or returned what are no rewards."""


def checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a reward function whose errors and results are checked, under a name of its own.

    One that is a coroutine stays one, which TRL awaits. `place` says where each prompt is from.
    """

    async def awaited(*, place: Sequence[str], **columns: Any) -> list[float | None]:
        with _explained(name, place):
            return check_rewards(await function(**columns), len(place))

    def called(*, place: Sequence[str], **columns: Any) -> list[float | None]:
        with _explained(name, place):
            return check_rewards(function(**columns), len(place))

    reward = awaited if is_async_callable(function) else called
    # As metrics are called; two functions of different modules may have one name.
    reward.__name__ = name.replace(":", ".")
    return reward


@contextmanager
def _explained(name: str, place: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RewardError(
            f"reward {name!r} raised {type(error).__name__} ({error}) on {len(place)} answers "
            f"({place[0]} is the first)."
        ) from error


def check_rewards(rewards: Any, number: int) -> list[float | None]:
    """Return what a function has returned as a list of numbers or None; refuse anything else.

    TRL would take nan for None, which says nothing.
    """
    values = [None if reward is None else float(reward) for reward in rewards]
    if len(values) != number or not all(math.isfinite(value or 0) for value in values):
        rule = f"a list of {number} numbers, or None where it says nothing"
        raise ValueError(f"it returned {rewards!r:.80}, and must return {rule}")
    return values


def load_rewards(
    given_rewards: Sequence[str | Callable[..., Any]], data: PromptDataConfig
) -> list[Callable[..., Any]]:
    """Return reward functions by their names, `module:name` or `reasoning-gym:TASK`, or as given.

    Importing a module runs its code; modules are looked for in the current folder too.
    """
    rewards = []
    for reward in given_rewards:
        name, function = reward_name(reward), reward
        if isinstance(reward, str):
            is_verifier = data.is_generated and name == data.path
            function = make_verifier(data) if is_verifier else _import(name)
        if not callable(function):
            raise ValueError(f"reward {name!r} is {function!r:.80}; it must be a function.")
        rewards.append(checked(name, function))
    return rewards


def _import(name: str) -> Any:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        return pkgutil.resolve_name(name)
    except Exception as error:
        raise ValueError(
            f"`reward` ({name!r}) must be a Python function as module:name, of a module in "
            f"{folder} or installed, or the reasoning-gym:TASK that `data.path` is; importing it "
            f"raised {type(error).__name__} ({error})."
        ) from error
    finally:
        sys.path.remove(folder)


def make_verifier(data: PromptDataConfig) -> Callable[..., list[float]]:
    """Return reasoning-gym's verifier of the data that it has generated for a run.

    It looks at what stands between the last <answer> and </answer>, or at the whole text where
    there is none. What it cannot read scores 0.
    """
    dataset = reasoning_gym_data(data)
    from reasoning_gym.utils import extract_answer  # only now is it sure to be installed

    entry_of = lru_cache(maxsize=1024)(dataset.__getitem__)

    def score(completion: Any, index: int) -> float:
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        marked = extract_answer(text)
        answer = text.strip() if marked is None else marked
        try:
            return float(dataset.score_answer(answer, entry_of(index)))
        except Exception:
            # Verifiers parse what a model wrote, and some raise what they please.
            return 0.0

    def verify(completions: list[Any], **columns: Any) -> list[float]:
        return [score(*pair) for pair in zip(completions, columns[INDEX], strict=True)]

    return verify
