"""Rewards of answers: Python functions, and checks of what they say.

A reward function is TRL's: called with `prompts`, `completions`, `completion_ids` and every column
of the data, all of them lists with one entry per answer, it returns as many numbers, None where it
says nothing.
"""

import math
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl.trainer.utils import is_async_callable

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
    given_rewards: Sequence[str | Callable[..., Any]],
) -> list[Callable[..., Any]]:
    """Return reward functions by their names, `module:name`, or as given.

    Importing a module runs its code; modules are looked for in the current folder too.
    """
    rewards = []
    for reward in given_rewards:
        name, function = reward_name(reward), reward
        if isinstance(reward, str):
            function = _import(name)
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
            f"{folder} or installed; importing it raised {type(error).__name__} ({error})."
        ) from error
    finally:
        sys.path.remove(folder)
