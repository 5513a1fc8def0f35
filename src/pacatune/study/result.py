"""What a study found: a result for each arm, from the rows of its runs, and the whole."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pacatune.reports.provenance import versions
from pacatune.reports.rows import Finished
from pacatune.study.plan import Plan
from pacatune.study.statistics import (
    Comparison,
    best_of,
    compare,
    is_at_edge,
    mean_of,
    median_of,
    std_of,
)

PACKAGES = ("trl", "accelerate", "datasets")
"""Whose versions are recorded beside those of every result."""
# Numbers of trained parameters that differ by more are not called equal.
_EQUAL_SHARE = 0.05

Place = tuple[str, float, int]
"""Arm, learning rate, seed."""
Ended = Mapping[Place, Finished]
"""What has run, failed or not."""


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """What an arm reached at its best learning rate, on test data."""

    name: str
    method: str
    rank: int | None
    learning_rate: float | None
    """Chosen on validation data; None if no rate worked with every seed that chooses."""
    values: dict[int, float]
    """Seed -> metric."""
    mean: float | None
    std: float | None
    """Standard deviation over seeds (n - 1); None with fewer than two."""
    num_trainable_parameters: int
    forgetting: float | None
    """Mean rise of the loss on general text."""
    rates: dict[float, float | None]
    """Learning rate -> mean of what chooses, on validation data; None where a run failed."""
    at_edge: bool
    """Whether the best rate is the smallest or largest of several, so that a better one may lie
    outside the grid."""
    comparison: Comparison | None
    """None for the reference."""
    failures: list[str]
    step_ms: float | None = None
    """Median over runs of the median time of a step; other programs may have been running."""
    saved_activation_bytes: float | None = None
    """Median over runs of what the first batch kept for the backward pass."""


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """A finished study, or what there is of one."""

    metric: str
    higher_is_better: bool
    reference: str
    arms: dict[str, ArmResult]
    warnings: list[str]
    config: dict[str, Any]
    versions: dict[str, str]


def numbers_of(run: Finished) -> dict[str, float]:
    """Return what was measured -> value."""
    return {row.what: row.value for row in run.rows}


def best_rate(plan: Plan, ended: Ended, name: str) -> float | None:
    """Return the rate with the best mean on validation data over the seeds that choose."""
    curve = _rate_curve(plan, ended, name)
    return best_of(curve, higher_is_better=plan.chosen_by != "loss")


def _rate_curve(plan: Plan, ended: Ended, name: str) -> dict[float, float | None]:
    """Return learning rate -> mean on validation data of what chooses, None where a run failed."""
    seeds = plan.config.seeds[: plan.config.tuning_seeds]
    what = f"validation {plan.chosen_by}"
    curve: dict[float, float | None] = {}
    for rate in plan.arms[name].learning_rates:
        runs = [numbers_of(ended[name, rate, s]) for s in seeds if (name, rate, s) in ended]
        values = [run[what] for run in runs if what in run]
        curve[rate] = mean_of(values) if len(values) == len(seeds) else None
    return curve


def summarise(plan: Plan, ended: Ended) -> StudyResult:
    """Return what each arm reached at its best rate, compared with the reference."""
    reference = str(plan.config.reference)
    first = _arm_result(plan, ended, reference, None)
    arms = {
        name: first if name == reference else _arm_result(plan, ended, name, first.values)
        for name in plan.arms
    }
    return StudyResult(
        metric=plan.metric,
        higher_is_better=plan.higher_is_better,
        reference=reference,
        arms=arms,
        warnings=[*plan.task.warnings, *_warnings(plan, ended, arms)],
        config=asdict(plan.config),
        versions=versions(*PACKAGES),
    )


def _arm_result(
    plan: Plan, ended: Ended, name: str, reference: dict[int, float] | None
) -> ArmResult:
    planned, rate = plan.arms[name], best_rate(plan, ended, name)
    runs = {
        seed: numbers_of(run)
        for (arm, at, seed), run in sorted(ended.items(), key=lambda item: item[0][2])
        if (arm, at) == (name, rate) and run.error is None
    }
    values = {seed: run[f"test {plan.metric}"] for seed, run in runs.items()}
    after = "general loss after"
    rises = [run[after] - run["general loss before"] for run in runs.values() if after in run]
    sizes = [int(run["trained parameters"]) for run in runs.values()]
    return ArmResult(
        name=name,
        method=planned.arm.method,
        rank=planned.rank,
        learning_rate=rate,
        values=values,
        mean=mean_of(list(values.values())),
        std=std_of(list(values.values())),
        num_trainable_parameters=max(sizes, default=planned.num_trainable_parameters),
        forgetting=mean_of(rises),
        rates=_rate_curve(plan, ended, name),
        at_edge=is_at_edge(rate, planned.learning_rates),
        step_ms=median_of(run.get("step") for run in runs.values()),
        saved_activation_bytes=median_of(run.get("kept for backward") for run in runs.values()),
        comparison=None if reference is None else compare(values, reference),
        failures=[
            f"rate {at:g}, seed {seed}: {run.error}"
            for (arm, at, seed), run in ended.items()
            if arm == name and run.error is not None
        ],
    )


def _warnings(plan: Plan, ended: Ended, arms: dict[str, ArmResult]) -> list[str]:
    found = [
        f"{name}: the best rate ({arm.learning_rate:g}) is at the edge of its grid "
        f"({', '.join(f'{rate:g}' for rate in arm.rates)}); a better one may lie outside."
        for name, arm in arms.items()
        if arm.at_edge
    ]
    for name, arm in arms.items():
        if arm.failures:
            found.append(f"{name}: {len(arm.failures)} runs failed; the next call tries again.")
        if arm.learning_rate is None and arm.failures:
            found.append(f"{name}: no rate of the grid worked, so there is no result.")
    if plan.config.match == "parameters":
        wanted = arms[str(plan.config.reference)].num_trainable_parameters
        found += [
            f"{name}: trains {arm.num_trainable_parameters:,} parameters, the reference {wanted:,}."
            for name, arm in arms.items()
            if abs(arm.num_trainable_parameters - wanted) > _EQUAL_SHARE * wanted
        ]
    if len({tuple(sorted(run.provenance["versions"].items())) for run in ended.values()}) > 1:
        found.append("the runs were done with different versions of packages; see jobs/.")
    return found
