"""How small models are trained: a grid of learning rates with one seed, the best one with all."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from experiments.paper import Line
from experiments.study.tasks import released

Result = TypeVar("Result")


def at_best_rate(
    rates: Sequence[float],
    seeds: Sequence[int],
    run: Callable[[float, int], Result],
    loss: Callable[[Result], float],
) -> tuple[float, list[Result]]:
    """Return the rate with the least loss of the first seed, and the runs of all seeds at it."""
    first, *others = seeds
    tried = {rate: run(rate, first) for rate in rates}
    best = min(rates, key=lambda rate: loss(tried[rate]))
    return best, [tried[best], *(run(best, seed) for seed in others)]


def rate_note(line: Line, rate: float, rates: Sequence[float]) -> str:
    """Say which learning rate was taken, if it lies at the edge of its grid."""
    if rate not in (min(rates), max(rates)):
        return ""
    return f"{line.title}: the best learning rate, {rate:g}, is at the edge of its grid."


@contextlib.contextmanager
def quiet(folder: Path) -> Iterator[None]:
    """Send what is printed meanwhile to a log in a folder, and free memory afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / "training.log").open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
        released(),
    ):
        yield
