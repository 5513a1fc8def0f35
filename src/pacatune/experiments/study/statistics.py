"""Means, spreads, and an exact paired test."""

from collections.abc import Collection, Iterable

import numpy as np

from pacatune.experiments.study.result import Comparison

# Differences whose sums are equal in exact arithmetic may differ in the last bits.
_SLACK = 1e-9


def mean_of(values: list[float]) -> float | None:
    """Return the mean; None of nothing."""
    return float(np.mean(values)) if values else None


def std_of(values: list[float]) -> float | None:
    """Return the standard deviation (n - 1); None of fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def pooled_std(groups: Iterable[Collection[float]]) -> float:
    """Return the standard deviation within groups, from all of them together.

    That of two values alone is often next to nothing by chance.

    Args:
        groups: Values that differ in nothing but chance; a group of one adds nothing.

    Returns:
        0 where no group has two.
    """
    several = [np.asarray(list(values)) for values in groups if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in several)
    return float(np.sqrt(squares / freedom)) if freedom else 0.0


def compare(arm: dict[int, float], reference: dict[int, float]) -> Comparison | None:
    """Compare two arms over the seeds that both have; None if there are none.

    Args:
        arm: Seed -> metric.
        reference: Seed -> metric.
    """
    seeds = sorted(arm.keys() & reference.keys())
    if not seeds:
        return None
    differences = [arm[seed] - reference[seed] for seed in seeds]
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
    assumes nothing about the distribution, and cannot be below 2 / 2^n.

    Args:
        differences: Differences of n pairs; the cost grows as 2^n.
    """
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    observed = abs(sum(differences))
    slack = _SLACK * float(np.abs(differences).sum())
    return float((np.abs(sums) >= observed - slack).mean())
