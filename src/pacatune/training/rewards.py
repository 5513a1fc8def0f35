"""Rewards of answers: Python functions and reasoning-gym's verifiers, and checks of what they say.

A reward function is TRL's: called with `prompts`, `completions`, `completion_ids` and every column
of the data, all of them lists with one entry per answer, it returns as many numbers, None where it
says nothing.
"""

import ast
import importlib.util
import inspect
import math
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from pacatune.data.config import PromptDataConfig
from pacatune.data.prompts import INDEX, reasoning_gym_data
from pacatune.training.config import reward_name

_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


class RewardError(ValueError):
    """A reward function failed, or returned what are no rewards."""


def checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a reward function whose errors and results are checked, under a name of its own.

    One that is a coroutine stays one, which TRL awaits. `place` says where each prompt is from.
    """

    async def awaited(*, place: Sequence[str], **columns: Any) -> list[float | None]:
        with _explained(name, place):
            rewards = await function(**columns)
        return check_rewards(name, rewards, place)

    def called(*, place: Sequence[str], **columns: Any) -> list[float | None]:
        with _explained(name, place):
            rewards = function(**columns)
        return check_rewards(name, rewards, place)

    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 (of an object's class)
    )
    reward = awaited if is_async else called
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


def check_rewards(name: str, rewards: Any, place: Sequence[str]) -> list[float | None]:
    """Return what a function has returned as a list of numbers or None; refuse anything else."""
    rule = f"it must return a list of {len(place)} numbers, or None where it says nothing."
    try:
        values = [None if reward is None else float(reward) for reward in rewards]
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward {name!r} returned {rewards!r:.80} ({error}); {rule}") from error
    if len(values) != len(place):
        raise RewardError(f"reward {name!r} returned a list of {len(values)}; {rule}")
    for value, where in zip(values, place, strict=True):
        if value is not None and not math.isfinite(value):
            raise RewardError(f"reward {name!r} returned {value} for {where}; {rule}")
    return values


def load_rewards(
    given_rewards: Sequence[str | Callable[..., Any]],
    data: PromptDataConfig,
    columns: Sequence[str],
) -> list[Callable[..., Any]]:
    """Return reward functions by their names, `module:name` or `reasoning-gym:TASK`, or as given.

    `columns` are those of the data beside `prompt`, which every function gets. Importing a module
    runs its code; modules are looked for in the current folder too.
    """
    given = (*_GIVEN, *(column for column in columns if column not in ("prompt", "place")))
    rewards = []
    for reward in given_rewards:
        name = reward_name(reward)
        if isinstance(reward, str):
            is_verifier = data.is_generated and name == data.path
            function = make_verifier(data) if is_verifier else _import(name)
        else:
            function = reward
        try:
            inspect.signature(function).bind(**dict.fromkeys(given))
        except TypeError as error:
            raise ValueError(
                f"reward {name!r} cannot be called with {', '.join(given)} ({error}); take what it "
                "needs of them by name and the others as **kwargs."
            ) from error
        rewards.append(checked(name, function))
    return rewards


def check_reward(name: str) -> None:
    """Refuse a function of a module that cannot be found, or does not have it; none is imported."""
    module, _, attribute = name.partition(":")
    try:
        with _current_folder():
            spec = importlib.util.find_spec(module)
    except Exception:  # of a package that is imported for it
        return
    if spec is None:
        raise _no_function(name, f"there is no module {module!r}")
    if spec.origin is None or not spec.origin.endswith(".py"):
        return
    try:
        tree = ast.parse(Path(spec.origin).read_bytes())
    except (SyntaxError, ValueError) as error:
        raise _no_function(name, f"{spec.origin} is no Python ({error})") from error
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    if not {attribute.partition(".")[0], "*", "__getattr__", "globals"} & names:
        raise _no_function(name, f"{spec.origin} has no {attribute!r}")


def _import(name: str) -> Callable[..., Any]:
    try:
        with _current_folder():
            function: Callable[..., Any] = pkgutil.resolve_name(name)
    except Exception as error:
        raise _no_function(name, f"importing it raised {type(error).__name__} ({error})") from error
    return function


@contextmanager
def _current_folder() -> Iterator[None]:
    """Find modules of the current folder, too."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _no_function(name: str, reason: str) -> ValueError:
    return ValueError(
        f"`reward` ({name!r}) must be a Python function as module:name, of a module in {Path.cwd()}"
        f" or installed, or the reasoning-gym:TASK that `data.path` is; {reason}."
    )


def make_verifier(data: PromptDataConfig) -> Callable[..., list[float]]:
    """Return reasoning-gym's verifier of the data that it has generated for a run.

    It looks at what stands between the last <answer> and </answer>, or at the whole text where
    there is none. What it cannot read scores 0.
    """
    made = reasoning_gym_data(data)
    from reasoning_gym.utils import extract_answer  # only now is it sure to be installed

    entry_of = lru_cache(maxsize=1024)(made.__getitem__)

    def score(completion: Any, index: int) -> float:
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        found = extract_answer(text)
        answer = text.strip() if found is None else found
        try:
            return float(made.score_answer(answer, entry_of(index)))
        except Exception:
            # Verifiers parse what a model wrote, and some raise what they please.
            return 0.0

    def verify(completions: list[Any], **columns: Any) -> list[float]:
        return [score(*pair) for pair in zip(completions, columns[INDEX], strict=True)]

    return verify
