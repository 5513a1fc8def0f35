"""Means, spreads and an exact paired test; the best learning rate of a grid."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

# Differences whose sums are equal in exact arithmetic may differ in the last bits.
_SLACK = 1e-9

Run = TypeVar("Run")


def mean_of(values: list[float]) -> float | None:
    """Return the mean; None of nothing."""
    return float(np.mean(values)) if values else None


def median_of(values: Iterable[float | None]) -> float | None:
    """Return the median of those that are known; None of none."""
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def std_of(values: list[float]) -> float | None:
    """Return the standard deviation (n - 1); None of fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def pooled_std(groups: Iterable[Collection[float]]) -> float:
    """Return the standard deviation within groups, from all of them; 0 where none has two values.

    Values of a group differ in nothing but chance. That of two alone is often next to nothing.
    """
    several = [np.asarray(list(values)) for values in groups if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in several)
    return float(np.sqrt(squares / freedom)) if freedom else 0.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm against the reference, over the seeds that both have."""

    mean: float
    """Mean of the differences by seed, arm minus reference, in the metric's own unit."""
    std: float | None
    """Their standard deviation (n - 1); None with one seed."""
    p_value: float
    """Exact two-sided sign-flip permutation test."""
    smallest_p_value: float
    """The least that the test can give with so many seeds, 2 / 2^n."""
    num_seeds: int


def compare(arm: dict[int, float], reference: dict[int, float]) -> Comparison | None:
    """Compare two arms' metric by seed over the seeds that both have; None if there are none."""
    differences = [arm[seed] - reference[seed] for seed in sorted(arm.keys() & reference.keys())]
    if not differences:
        return None
    return Comparison(
        mean=float(np.mean(differences)),
        std=std_of(differences),
        p_value=sign_flip_p_value(differences),
        smallest_p_value=2.0 / 2 ** len(differences),
        num_seeds=len(differences),
    )


def sign_flip_p_value(differences: list[float]) -> float:
    """Return the two-sided p-value of an exact sign-flip permutation test of the mean.

    If the arms do not differ, each difference could as well have the other sign. The p-value is the
    share of all 2^n choices of signs whose mean is at least as far from 0 as the observed one. It
    assumes nothing about the distribution, cannot be below 2 / 2^n, and costs as much as 2^n.
    """
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    observed = abs(sum(differences))
    slack = _SLACK * float(np.abs(differences).sum())
    return float((np.abs(sums) >= observed - slack).mean())


def best_of(curve: Mapping[float, float | None], *, higher_is_better: bool = False) -> float | None:
    """Return the rate with the best value on validation data, None if no rate has one."""
    sign = 1 if higher_is_better else -1
    found = {rate: sign * value for rate, value in curve.items() if value is not None}
    return max(found, key=lambda rate: found[rate]) if found else None


def is_at_edge(rate: float | None, rates: Collection[float]) -> bool:
    """Whether a rate is the smallest or largest of several: a better one may lie outside."""
    return len(rates) > 1 and rate in (min(rates), max(rates))


def rate_beyond(rate: float | None, rates: Collection[float]) -> float | None:
    """Return the next rate outside of a grid whose best is at the edge; None if it is not."""
    if rate is None or not is_at_edge(rate, rates):
        return None
    ordered = sorted(rates)
    neighbour = ordered[1] if rate == ordered[0] else ordered[-2]
    return float(f"{rate * rate / neighbour:.3g}")


@dataclass(frozen=True, kw_only=True)
class Tuned(Generic[Run]):
    """A method at the best rate of its grid."""

    rate: float
    curve: dict[float, float]
    """Rate -> value on validation data."""
    runs: dict[int, Run]
    """Seed -> run at the best rate."""

    def to_dict(self) -> dict[str, Any]:
        """Return the rate and the grid as JSON values."""
        rates = {str(rate): value for rate, value in self.curve.items()}
        return {"learning_rate": self.rate, "rates": rates}


def tune(
    rates: Sequence[float],
    seeds: Sequence[int],
    train: Callable[[float, int], Run],
    validation: Callable[[Run], float],
) -> Tuned[Run]:
    """Train at each rate with the first seed, and at the best one (the least value) with all."""
    if not rates:
        raise ValueError("`rates` is empty; give at least one learning rate.")
    first = {rate: train(rate, seeds[0]) for rate in rates}
    curve = {rate: validation(run) for rate, run in first.items()}
    best = min(curve, key=lambda rate: curve[rate])
    others = {seed: train(best, seed) for seed in seeds[1:]}
    return Tuned(rate=best, curve=curve, runs={seeds[0]: first[best], **others})
