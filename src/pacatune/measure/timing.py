"""Take turns and compare: all contenders alternate in one process, so that noise hits all alike."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pacatune.reports.rows import Row

Times = list[float]
_NUM_RESAMPLES = 2000
_NUM_ROUNDS_PER_COLLECTION = 10


def order_of_round(num: int, round_: int) -> list[int]:
    """Return who goes when: over `2 * num` rounds, everybody follows everybody equally often.

    A plain rotation would let each contender always find the caches as the same other one left
    them. This is Williams' design: 0, n-1, 1, n-2, ... shifted by the round, odd rounds reversed.
    """
    zigzag = [i // 2 if i % 2 == 0 else num - (i + 1) // 2 for i in range(num)]
    order = [(place + round_ // 2) % num for place in zigzag]
    return order[::-1] if round_ % 2 else order


def alternate(
    runs: dict[str, Callable[[], Any]], *, seconds: float, min_rounds: int, num_warmup: int
) -> dict[str, list[Any]]:
    """Let every contender run once per round until the time is up; return what each measured.

    The warm-up is not in the time, and `min_rounds` are made however long they take.
    """
    names = list(runs)
    measured: dict[str, list[Any]] = {name: [] for name in names}
    with _without_gc():
        for round_ in range(num_warmup):
            for i in order_of_round(len(names), round_):
                runs[names[i]]()
        end, round_ = time.monotonic() + seconds, 0
        while round_ < min_rounds or time.monotonic() < end:
            for i in order_of_round(len(names), round_):
                measured[names[i]].append(runs[names[i]]())
            round_ += 1
            if round_ % _NUM_ROUNDS_PER_COLLECTION == 0:
                gc.collect()
    return measured


@contextmanager
def _without_gc() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # the collections between rounds need not visit the models
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def time_row(times: Times, **names: Any) -> Row:
    """Return the median of times in seconds as a row in milliseconds, with the quartiles.

    Args:
        times: Of each round.
        **names: `what`, `method` and other fields of the row.
    """
    low, median, high = (
        statistics.quantiles(times, n=4, method="inclusive") if times[1:] else times * 3
    )
    return Row(value=1e3 * median, low=1e3 * low, high=1e3 * high, unit="ms", n=len(times), **names)


def ratio_row(times: Times, reference: Times, *, seed: int, **names: Any) -> Row:
    """Return the ratio of two contenders' medians as a row, and how sure it is.

    Both have times of the same rounds. `low` and `high` bound the 95 % interval of a bootstrap that
    draws rounds: what disturbed one round disturbed both.

    Args:
        times: Of each round, seconds.
        reference: The same of the other contender.
        seed: Of the draws.
        **names: `what`, `method` and other fields of the row.
    """
    both = torch.tensor([times, reference], dtype=torch.float64, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    size = (_NUM_RESAMPLES, len(times))
    draws = torch.randint(len(times), size, generator=generator, device="cpu")
    medians = both[:, draws].quantile(0.5, dim=-1)
    low, high = (medians[0] / medians[1]).quantile(both.new_tensor([0.025, 0.975])).tolist()
    ratio = statistics.median(times) / statistics.median(reference)
    return Row(value=ratio, low=low, high=high, unit="ratio", n=len(times), **names)
