"""From a study's configuration to its runs: task, ranks, grids, keys."""

import hashlib
import json
import sys
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pacatune.methods import METHODS, readers_of, size_options
from pacatune.study.config import Arm, StudyConfig
from pacatune.study.tasks import StudyTask, Values, merged
from pacatune.training.config import RunConfig, default_rate
from pacatune.training.config_file import read_values, to_values
from pacatune.training.sections import ADAPTER_SECTIONS
from pacatune.training.tasks import TASKS

# Of a run's options, those that change no number; what paths hold is part of the key as a digest.
_FREE = {
    "model": ("path",),
    "data": ("path",),
    "training": ("output_dir", "report_to", "disable_tqdm", "logging_dir", "run_name"),
}


@dataclass(frozen=True, kw_only=True)
class PlannedArm:
    """An arm with all that the study decides about it."""

    name: str
    arm: Arm
    rank: int | None
    learning_rates: list[float]
    num_trainable_parameters: int
    options: Values
    """Options of its runs, over the task's, but for rate, seed and folder."""


@dataclass(kw_only=True)
class Plan:
    """What a study will run."""

    config: StudyConfig
    task: StudyTask
    arms: dict[str, PlannedArm]

    @property
    def metric(self) -> str:
        """What is compared."""
        return self.task.metric

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the metric is better."""
        return self.metric != "loss"

    @property
    def chosen_by(self) -> str:
        """What chooses the rates, on validation data."""
        return self.metric if self.config.choose_by == "metric" else "loss"

    @property
    def num_runs(self) -> int:
        """Return how many runs the whole study takes."""
        seeds, tuning = len(self.config.seeds), self.config.tuning_seeds
        return sum(len(a.learning_rates) * tuning + seeds - tuning for a in self.arms.values())

    def add_rate(self, name: str, rate: float) -> None:
        """Let an arm try another rate."""
        arm = self.arms[name]
        self.arms[name] = replace(arm, learning_rates=sorted([*arm.learning_rates, rate]))

    def make_run(self, name: str, rate: float, seed: int, folder: Path) -> RunConfig:
        """Build one run of an arm, whose trainer has a scratch folder."""
        return self.task.make_run(self.arms[name].options, rate, seed, folder)

    def inputs(self, run: RunConfig) -> dict[str, Any]:
        """Return all that decides the numbers of a run, but for versions."""
        values = to_values(run.settled())
        for section, names in _FREE.items():
            for name in names:
                values[section].pop(name, None)
        test = {k: v for k, v in self.task.test_options.items() if not k.endswith("path")}
        more: Values = {"exact_match": True} if self.metric == "exact_match" else {}
        if self.metric == "exact_match" and self.config.choose_by == "loss":
            more = {"exact_match": "test"}
        more |= {"rewind": self.task.rewind} if self.task.rewind else {}
        return {"run": values, "test": test, "data": self.task.look(run)[0], **more}


def key_of(inputs: dict[str, Any]) -> str:
    """Return the hash of all that decides the numbers of a run."""
    text = json.dumps(list(inputs.values()), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def make_plan(config: StudyConfig) -> Plan:
    """Read the task and settle every arm, before anything runs."""
    task = _open_task(config)
    if config.metric != "auto":
        task.metric = config.metric
    if config.unrelated and not (unrelated := Path(config.unrelated).expanduser()).is_file():
        raise FileNotFoundError(f"`unrelated` ({config.unrelated!r}) is no file; name one of rows.")
    task.unrelated = str(unrelated) if config.unrelated else ""
    task.rewind = config.rewind
    if config.choose_by == "loss":
        task.matched = ("test",)
    if task.metric not in task.metrics:
        raise ValueError(
            f"`metric` ({task.metric!r}) is not measured by {config.command}; use one of "
            f"{', '.join(task.metrics)}."
        )
    methods = {arm.method for arm in config.arms.values()}
    for name in ADAPTER_SECTIONS:
        used_by = readers_of(name)
        if config.options.get(name) and not methods.intersection(used_by):
            raise ValueError(
                f"`options` has the section {name!r}, which only {', '.join(used_by)} would read, "
                f"and the arms are of {', '.join(sorted(methods))}; drop it or add such an arm."
            )
    reference = str(config.reference)
    first = _plan_arm(config, task, reference, None)
    arms = {n: first if n == reference else _plan_arm(config, task, n, first) for n in config.arms}
    return Plan(config=config, task=task, arms=arms)


def _open_task(config: StudyConfig) -> StudyTask:
    path = Path(config.task).expanduser()
    if config.task and not path.is_file():
        raise FileNotFoundError(
            f"`task` ({config.task!r}) is no file; name a configuration of {config.command}. In a "
            f"checkout, `python -m examples.packaged {path.stem}` prepares those that are packaged."
        )
    values = merged(read_values(path) if config.task else {}, config.options)
    return StudyTask(config.command, values, config.validation_fraction, config.forgetting_tokens)


def _plan_arm(
    config: StudyConfig, task: StudyTask, name: str, reference: PlannedArm | None
) -> PlannedArm:
    arm = config.arms[name]
    try:
        rank = arm.rank
        if rank is None and METHODS[arm.method].has_adapter:
            if reference is not None and config.match == "parameters":
                rank = _matching_rank(task, arm, reference.num_trainable_parameters)
            elif reference is None or (rank := reference.rank) is None:
                raise ValueError("it has no `rank`, nor has the reference one to share; give one.")
        options = arm_options(arm, rank)
        run = task.make_run(options, 1e-3, config.seeds[0], Path("unused"))
        return PlannedArm(
            name=name,
            arm=arm,
            rank=rank,
            learning_rates=_grid(config, task, arm),
            num_trainable_parameters=task.count(run),
            options=options,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"arm {name!r}: {error}") from error


def _grid(config: StudyConfig, task: StudyTask, arm: Arm) -> list[float]:
    given = arm.learning_rates or config.learning_rates.get(arm.method)
    if given is not None:
        return sorted(given)
    default = default_rate(TASKS[task.kind], arm.method)
    return [float(f"{default * factor:.2g}") for factor in (1 / 3, 1, 3)]


def arm_options(arm: Arm, rank: int | None) -> Values:
    """Return an arm as options of a run: method, adapter, and what it says itself."""
    method = METHODS[arm.method]
    options: Values = {"method": arm.method}
    if method.has_adapter:
        assert rank is not None
        alpha = rank if arm.alpha is None else arm.alpha
        options[method.sections[0]] = size_options(method, rank, alpha)
    # What an arm says of another method's adapter is refused by the run.
    given: Values = {"lora": {"lora_dropout": arm.dropout}} if arm.dropout else {}
    given |= {"paca": {"selection": arm.selection}} if arm.selection != "random" else {}
    return merged(merged(options, given), arm.options)


def _matching_rank(task: StudyTask, arm: Arm, number: int) -> int:
    """Return the rank with which an arm trains about as many parameters, by bisection."""

    @cache
    def count(rank: int) -> int:
        try:
            return task.count(task.make_run(arm_options(arm, rank), 1e-3, 0, Path("unused")))
        except ValueError:
            if rank == 1:
                raise
            return sys.maxsize  # more than a weight takes

    high = 1
    while count(high) < min(number, count(2 * high)):  # it grows until all columns are trained
        high *= 2
    above = bisect_left(range(high + 1), number, lo=max(high // 2, 1), key=count)
    best = min(max(above - 1, 1), above, key=lambda rank: abs(count(rank) - number))
    if abs(count(best) - number) > number / 4:
        raise ValueError(
            f"no rank trains about as many parameters as the reference ({number:,}): rank {best} "
            f"trains {count(best):,}; give `rank`."
        )
    return best
