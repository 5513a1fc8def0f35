"""Means, spreads and an exact paired test; the best learning rate of a grid."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

# Differences whose sums are equal in exact arithmetic may differ in the last bits.
_SLACK = 1e-9


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
