"""From a study's configuration to its runs: task, ranks, grids, keys."""

import hashlib
import json
import sys
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from pacatune.methods import METHODS, readers_of, size_options
from pacatune.study.config import Arm, StudyConfig
from pacatune.study.tasks import TASKS, StudyTask, Values, merged
from pacatune.training.config import default_rate
from pacatune.training.config_file import read_values, to_values
from pacatune.training.sections import ADAPTER_SECTIONS
from pacatune.training.tasks import TASKS as TASK_SPECS

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
    metric: str
    arms: dict[str, PlannedArm]
    _digests: dict[str, str] = field(default_factory=dict)

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the metric is better."""
        return self.metric != "loss"

    @property
    def num_runs(self) -> int:
        """Return how many runs the whole study takes."""
        seeds, tuning = len(self.config.seeds), self.config.tuning_seeds
        return sum(len(a.learning_rates) * tuning + seeds - tuning for a in self.arms.values())

    def add_rate(self, name: str, rate: float) -> None:
        """Let an arm try another rate."""
        arm = self.arms[name]
        self.arms[name] = replace(arm, learning_rates=sorted([*arm.learning_rates, rate]))

    def make_run(self, name: str, rate: float, seed: int, folder: Path) -> Any:
        """Build one run of an arm, whose trainer has a scratch folder."""
        return self.task.make_run(self.arms[name].options, rate, seed, folder)

    def key(self, run: Any) -> str:
        """Return the hash of all that decides the numbers of a run, but for versions."""
        values = to_values(run)
        where = json.dumps([values["data"], values["model"]], sort_keys=True)
        if where not in self._digests:
            self._digests[where] = self.task.digest(run)
        for section, names in _FREE.items():
            for name in names:
                values[section].pop(name, None)
        test = {k: v for k, v in self.task.test_options.items() if not k.endswith("path")}
        content = [values, test, self._digests[where]]
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def make_plan(config: StudyConfig) -> Plan:
    """Read the task and settle every arm, before anything runs."""
    task, command = _open_task(config), config.command
    methods = TASK_SPECS[task.kind].methods
    metric = task.metrics[0] if config.metric == "auto" else config.metric
    if metric not in task.metrics:
        raise ValueError(
            f"`metric` ({metric!r}) is not measured by {command}; use one of "
            f"{', '.join(task.metrics)}."
        )
    task.metric = metric
    for name, arm in config.arms.items():
        if arm.method not in methods:
            raise ValueError(
                f"arm {name!r}: `method` ({arm.method!r}) is not offered by {command}; use "
                f"one of {', '.join(methods)}."
            )
    _refuse_unused(config)
    arms: dict[str, PlannedArm] = {}
    reference = str(config.reference)
    for name in [reference, *(name for name in config.arms if name != reference)]:
        arms[name] = _plan_arm(config, task, name, arms.get(reference))
    return Plan(
        config=config, task=task, metric=metric, arms={name: arms[name] for name in config.arms}
    )


def _refuse_unused(config: StudyConfig) -> None:
    methods = {arm.method for arm in config.arms.values()}
    for name in ADAPTER_SECTIONS:
        used_by = readers_of(name)
        if config.options.get(name) and not methods.intersection(used_by):
            raise ValueError(
                f"`options` has the section {name!r}, which only {', '.join(used_by)} would read, "
                f"and the arms are of {', '.join(sorted(methods))}; drop it or add such an arm."
            )


def _open_task(config: StudyConfig) -> StudyTask:
    path = Path(config.task).expanduser()
    if config.task and not path.is_file():
        raise FileNotFoundError(
            f"`task` ({config.task!r}) is no file; name a configuration of {config.command}. In a "
            f"checkout, `python -m examples.packaged {path.stem}` prepares those that are packaged."
        )
    values = merged(read_values(path) if config.task else {}, config.options)
    return TASKS[config.command](values, config.validation_fraction, config.forgetting_tokens)


def _plan_arm(
    config: StudyConfig,
    task: StudyTask,
    name: str,
    reference: PlannedArm | None,
) -> PlannedArm:
    arm = config.arms[name]
    try:
        rank = arm.rank
        if rank is None and METHODS[arm.method].has_adapter:
            assert reference is not None, "the configuration demands a rank of the reference"
            rank = reference.rank
            if config.match == "parameters":
                rank = _matching_rank(task, arm, reference.num_trainable_parameters)
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
    default = default_rate(TASK_SPECS[task.kind], arm.method)
    return [float(f"{default * factor:.2g}") for factor in (1 / 3, 1, 3)]


def arm_options(arm: Arm, rank: int | None) -> Values:
    """Return an arm as options of a run: method, adapter, and what it says itself."""
    alpha = rank if arm.alpha is None else arm.alpha
    method = METHODS[arm.method]
    options: Values = {"method": arm.method}
    if method.has_adapter:
        assert rank is not None
        assert alpha is not None
        options[method.sections[0]] = size_options(method, rank, alpha, arm.dropout)
    if method.is_paca:
        options["paca"]["selection"] = arm.selection
    return merged(options, arm.options)


def _matching_rank(task: StudyTask, arm: Arm, number: int) -> int:
    """Return the rank with which an arm trains about as many parameters, by bisection."""

    @cache
    def count(rank: int) -> int:
        try:
            return task.count(task.make_run(arm_options(arm, rank), 1e-3, 0, Path("unused")))
        except ValueError:
            if rank == 1:
                raise
            return sys.maxsize  # more columns than a weight has

    high = 1
    while count(high) < number:
        high *= 2
    above = bisect_left(range(high + 1), number, lo=max(high // 2, 1), key=count)
    best = min(max(above - 1, 1), above, key=lambda rank: abs(count(rank) - number))
    if abs(count(best) - number) > number / 4:
        raise ValueError(
            f"no rank trains about as many parameters as the reference ({number:,}): rank {best} "
            f"trains {count(best):,}; give `rank`."
        )
    return best
