"""The best learning rate of a grid on validation data, then every seed at it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Tuned", "best_of", "is_at_edge", "rate_beyond", "tune"]

Run = TypeVar("Run")


@dataclass(frozen=True, kw_only=True)
class Tuned(Generic[Run]):
    """A method at the best rate of its grid."""

    rate: float
    curve: dict[float, float | None]
    """Rate -> value on validation data, None where a run failed."""
    runs: dict[int, Run]
    """Seed -> run at the best rate."""


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


def tune(
    rates: Sequence[float],
    seeds: Sequence[int],
    train: Callable[[float, int], Run],
    validation: Callable[[Run], float],
) -> Tuned[Run]:
    """Train at each rate with the first seed, and at the best one with all.

    Args:
        rates: The grid.
        seeds: The first one chooses.
        train: Called with rate and seed, each pair once.
        validation: What a run reached on validation data; less is better.

    Raises:
        ValueError: If there is no rate.
    """
    first = {rate: train(rate, seeds[0]) for rate in rates}
    curve: dict[float, float | None] = {rate: validation(run) for rate, run in first.items()}
    best = best_of(curve)
    if best is None:
        raise ValueError("`rates` is empty; give at least one learning rate.")
    others = {seed: train(best, seed) for seed in seeds[1:]}
    return Tuned(rate=best, curve=curve, runs={seeds[0]: first[best], **others})
