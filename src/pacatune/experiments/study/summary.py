"""From the records of runs to what each arm reached."""

from dataclasses import asdict

from pacatune.experiments.study.plan import Plan
from pacatune.experiments.study.result import METRICS, PACKAGES, ArmResult, RunRecord, StudyResult
from pacatune.experiments.study.statistics import compare, mean_of, std_of
from pacatune.experiments.study.tuning import best_of, is_at_edge
from pacatune.reports.provenance import versions

Place = tuple[str, float, int]
"""Arm, learning rate, seed."""
# Numbers of trained parameters that differ by more are not called equal.
_EQUAL_SHARE = 0.05


def best_rate(plan: Plan, records: dict[Place, RunRecord], name: str) -> float | None:
    """Return the rate with the best mean on validation data over the seeds that choose."""
    return best_of(rate_curve(plan, records, name), higher_is_better=METRICS[plan.metric])


def rate_curve(plan: Plan, records: dict[Place, RunRecord], name: str) -> dict[float, float | None]:
    """Return learning rate -> mean metric on validation data, None where a run failed."""
    seeds = plan.config.seeds[: plan.config.tuning_seeds]
    curve: dict[float, float | None] = {}
    for rate in plan.arms[name].learning_rates:
        ended = [records[name, rate, seed] for seed in seeds]
        values = [r.validation[plan.metric] for r in ended if r.error is None]
        curve[rate] = mean_of(values) if len(values) == len(seeds) else None
    return curve


def summarise(plan: Plan, records: dict[Place, RunRecord]) -> StudyResult:
    """Return what each arm reached at its best rate, compared with the reference.

    Args:
        plan: What was to run.
        records: What has run, failed or not.
    """
    reference = str(plan.config.reference)
    chosen = {name: best_rate(plan, records, name) for name in plan.arms}
    values = {name: _values(plan, records, name, rate) for name, rate in chosen.items()}
    arms = {
        name: _arm_result(plan, records, name, chosen[name], values, reference)
        for name in plan.arms
    }
    return StudyResult(
        metric=plan.metric,
        higher_is_better=METRICS[plan.metric],
        reference=reference,
        arms=arms,
        warnings=[*plan.task.warnings, *_warnings(plan, records, arms)],
        config=asdict(plan.config),
        versions=versions(*PACKAGES),
    )


def _values(
    plan: Plan, records: dict[Place, RunRecord], name: str, rate: float | None
) -> dict[int, float]:
    ended = {r.seed: r for (arm, at, _), r in records.items() if (arm, at) == (name, rate)}
    good = {seed: record for seed, record in sorted(ended.items()) if record.error is None}
    return {seed: record.test[plan.metric] for seed, record in good.items()}


def _arm_result(
    plan: Plan,
    records: dict[Place, RunRecord],
    name: str,
    rate: float | None,
    values: dict[str, dict[int, float]],
    reference: str,
) -> ArmResult:
    planned, mine = plan.arms[name], values[name]
    numbers = list(mine.values())
    rises = [
        record.forgetting["after"] - record.forgetting["before"]
        for seed in mine
        if rate is not None and (record := records[name, rate, seed]).forgetting
    ]
    failures = [
        f"rate {at:g}, seed {seed}: {record.error}"
        for (arm, at, seed), record in records.items()
        if arm == name and record.error is not None
    ]
    return ArmResult(
        name=name,
        method=planned.arm.method,
        rank=planned.rank,
        learning_rate=rate,
        values=mine,
        mean=mean_of(numbers),
        std=std_of(numbers),
        # Ranks that gradients decide about are known when a run has ended.
        num_trainable_parameters=max(
            (records[name, rate, seed].num_trainable_parameters for seed in mine if rate),
            default=planned.num_trainable_parameters,
        ),
        forgetting=mean_of(rises),
        rates=rate_curve(plan, records, name),
        at_edge=is_at_edge(rate, planned.learning_rates),
        comparison=None if name == reference else compare(mine, values[reference]),
        failures=failures,
    )


def _warnings(plan: Plan, records: dict[Place, RunRecord], arms: dict[str, ArmResult]) -> list[str]:
    found = [
        f"{name}: the best rate ({arm.learning_rate:g}) is at the edge of its grid "
        f"({', '.join(f'{rate:g}' for rate in arm.rates)}); a better one may lie outside."
        for name, arm in arms.items()
        if arm.at_edge
    ]
    for name, arm in arms.items():
        if arm.failures:
            found.append(f"{name}: {len(arm.failures)} runs failed; the next call tries again.")
        if arm.learning_rate is None:
            found.append(f"{name}: no rate of the grid worked, so there is no result.")
    if plan.config.match == "parameters":
        wanted = arms[str(plan.config.reference)].num_trainable_parameters
        found += [
            f"{name}: trains {arm.num_trainable_parameters:,} parameters, the reference {wanted:,}."
            for name, arm in arms.items()
            if abs(arm.num_trainable_parameters - wanted) > _EQUAL_SHARE * wanted
        ]
    if len({tuple(sorted(record.versions.items())) for record in records.values()}) > 1:
        found.append("the runs were done with different versions of packages; see runs/.")
    return found
