"""Cells that a study computes: one method at its best rate of a grid, over some seeds."""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pacatune.experiments.reproduce.experiment import Cell, Results
from pacatune.experiments.reproduce.section import Measured
from pacatune.experiments.study import Arm, StudyConfig
from pacatune.experiments.study.statistics import pooled_std
from pacatune.experiments.study.tuning import is_at_edge

__all__ = ["SPREAD_NOTE", "one_arm", "scores_of", "study_cell"]

SPREAD_NOTE = (
    "Intervals are two standard errors on either side of the mean: of the seeds, whose spread is "
    "taken from all lines together, and for accuracies of the number of test examples as well."
)


def study_cell(config: StudyConfig, key: str, title: str, method: str) -> Cell:
    """Return the cell of one arm.

    Args:
        config: A study with that arm alone.
        key: Key of the cell.
        title: What is trained.
        method: By the paper's name, for --only.
    """
    return Cell(
        key=key,
        title=f"training {title}",
        methods=(method,),
        inputs=asdict(config),
        run=partial(_run, config),
    )


def one_arm(task: str, name: str, arm: Arm, **options: Any) -> StudyConfig:
    """Return a study of one arm, without the general text of others."""
    return StudyConfig(task=task, arms={name: arm}, forgetting_tokens=0, **options)


def _run(config: StudyConfig, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    from rich.console import Console

    from pacatune.experiments.study import run_study

    folder.parent.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, markup=False)
    result = run_study(config, folder, console=console)
    (arm,) = result.arms.values()
    if arm.mean is None:
        raise RuntimeError(f"no run of {arm.name} ended well: {' '.join(arm.failures)}")
    return {
        "metric": result.metric,
        "values": {str(seed): value for seed, value in arm.values.items()},
        "mean": arm.mean,
        "std": arm.std,
        "learning_rate": arm.learning_rate,
        "rates": {str(rate): value for rate, value in arm.rates.items()},
        "num_trainable_parameters": arm.num_trainable_parameters,
        "warnings": result.warnings,
    }


def scores_of(
    cells: Mapping[str, str], results: Results, num_examples: int | None = None
) -> dict[str, Measured]:
    """Return the mean over seeds of each line that there is, with two standard errors.

    The spread over seeds is that of all lines together.

    Args:
        cells: Key of a line -> key of its cell.
        results: All there are.
        num_examples: Size of the test, where the metric is an accuracy; in per cent then.
    """
    found = {line: results[key] for line, key in cells.items() if key in results}
    std = pooled_std(result["values"].values() for result in found.values())
    return {line: _score(result, std, num_examples) for line, result in found.items()}


def _score(result: dict[str, Any], std: float, num_examples: int | None) -> Measured:
    unit = 1.0 if num_examples is None else 100.0
    values = list(result["values"].values())
    error = std / math.sqrt(len(values))
    mean = statistics.mean(values)
    if num_examples is not None:
        error = math.hypot(error, math.sqrt(max(mean * (1 - mean), 0.0) / num_examples))
    spread = 2 * error * unit
    value = mean * unit
    rate, rates = result["learning_rate"], [float(rate) for rate in result.get("rates", {})]
    return Measured(
        value=value,
        low=value - spread,
        high=value + spread,
        origin="measured",
        rate=rate,
        at_edge=is_at_edge(rate, rates),
    )
