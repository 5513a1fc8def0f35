"""Where PaCA's distance to the frozen model goes: steps whose parts are timed where they happen.

A part is timed within the step, with the caches as the step leaves them; alone, in a loop, it would
look several times faster. So one more contender takes its turn in each round: the PaCA model with a
clock around each part. A part's time is the median over these rounds. What is left of the distance
(PaCA's median step minus the frozen model's, both without clocks) is the rest: Python, autograd,
views and casts, and what large products lose to colder caches. Noise may make it negative.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from rich import box
from rich.table import Table
from torch import Tensor

from benchmarks.llama import make_step
from benchmarks.methods import OURS
from benchmarks.record import Row
from pacatune.measure.methods import Contender
from pacatune.ops import linear
from pacatune.residency import weight

TIMED = "timed"
"""What the contender with clocks is called."""
PARTS = {
    "gather": "x[..., indices] in the forward pass",
    "thin_product": "the gradient of delta",
    "write": "columns put into the weights, and back",
    "added_products": "in place of a write: products of the columns beside the weight",
    "optimizer": "step and zero_grad",
}
# Whose attribute does a part.
_FUNCTIONS: tuple[tuple[str, Any, str], ...] = (
    ("gather", Tensor, "index_select"),
    ("thin_product", linear, "grad_delta"),
    ("write", weight, "put"),
    ("added_products", linear, "add_columns_"),
    ("added_products", linear, "add_grad_columns_"),
)


class TimedStep:
    """A contender's step, and the seconds of each of its parts."""

    def __init__(
        self,
        contender: Contender,
        batch: Tensor,
        accumulation: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._step, self._clock = make_step(contender, batch, accumulation), clock
        self._contender = contender
        self._is_timing = False
        self.rounds: list[dict[str, float]] = []
        """The seconds of each part, by round."""

    def __call__(self) -> float:
        """Make a step with clocks; return its seconds."""
        self.rounds.append(dict.fromkeys(PARTS, 0.0))
        with self._clocks():
            return self._step()

    @contextmanager
    def _clocks(self) -> Iterator[None]:
        optimizer = self._contender.optimizer
        methods = [("optimizer", optimizer, name) for name in ("step", "zero_grad")]
        with ExitStack() as stack:
            for part, owner, name in (*_FUNCTIONS, *methods):
                timed = self._timed(part, getattr(owner, name))
                stack.enter_context(patch.object(owner, name, timed))
            yield

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._is_timing:  # a part of a part
                return function(*args, **kwargs)
            self._is_timing = True
            start = self._clock()
            try:
                return function(*args, **kwargs)
            finally:
                self.rounds[-1][part] += self._clock() - start
                self._is_timing = False

        return timed


def make_row(setting: Row, rows: list[Row], timed: TimedStep, num_rounds: int) -> Row:
    """Return the distance of PaCA's step to the frozen one and its parts, in milliseconds."""
    steps = {row["method"]: row["step_ms"] for row in rows}
    distance = steps[OURS] - steps["frozen"]
    rounds = timed.rounds[-num_rounds:]  # without the warm-up
    parts = {f"{part}_ms": 1e3 * statistics.median(one[part] for one in rounds) for part in PARTS}
    return {
        **setting,
        "frozen_ms": steps["frozen"],
        "distance_ms": distance,
        **parts,
        "rest_ms": distance - sum(parts.values()),
    }


def cells(row: Row) -> list[str]:
    """Return a row's distance and its parts, in percent of the frozen step."""
    names = ("distance", *PARTS, "rest")
    return [f"{100 * row[f'{name}_ms'] / row['frozen_ms']:.1f}" for name in names]


TITLES = ("in all", *(part.replace("_", " ") for part in PARTS), "rest")
"""Titles of what `cells` returns."""


def meanings() -> dict[str, str]:
    """Return what each part is, by its title."""
    known = {part.replace("_", " "): text for part, text in PARTS.items()}
    return known | {"rest": "Python, autograd, views and casts, colder caches"}


def make_table(rows: list[Row]) -> Table:
    """Return the parts of all distances as a Markdown table."""
    table = Table(box=box.MARKDOWN)
    table.add_column(f"{OURS} beyond frozen, %", no_wrap=True)
    for title in TITLES:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(row["setting"], *cells(row))
    return table
