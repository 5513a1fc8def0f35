"""Where PaCA's distance to the frozen model goes: steps whose parts are timed where they happen.

A part is timed within the step, with the caches as the step leaves them; alone, in a loop, it would
look several times faster. So one more contender takes its turn in each round: the PaCA model with a
clock around each part. A part's time is the median over these rounds. What is left of the distance
(PaCA's median step minus the frozen model's, both without clocks) is the rest: Python, autograd,
views and casts, and what large products lose to colder caches. Noise may make it negative.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor

from benchmarks.methods import OURS
from pacatune.measure.step import Step
from pacatune.ops import linear
from pacatune.reports.rows import Row
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
    """A step, and the seconds of each of its parts."""

    def __init__(self, step: Step) -> None:
        self._step, self._clock = step, step.clock
        self._is_timing = False
        self.rounds: list[dict[str, float]] = []
        """The seconds of each part, by round."""

    def __call__(self) -> float:
        """Make a step with clocks; return its seconds."""
        self.rounds.append(dict.fromkeys(PARTS, 0.0))
        with self._clocks():
            return self._step.seconds()

    @contextmanager
    def _clocks(self) -> Iterator[None]:
        optimizer = self._step.contender.optimizer
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


def distance_rows(rows: list[Row], timed: TimedStep) -> list[Row]:
    """Return PaCA's distance to the frozen model and its parts, in per cent of the frozen step."""
    steps = {row.method: row for row in rows if row.what == "step" and row.unit == "ms"}
    ours, frozen = steps[OURS], steps["frozen"]
    rounds = timed.rounds[-ours.n :]  # without the warm-up
    parts = {part: 1e3 * statistics.median(one[part] for one in rounds) for part in PARTS}
    distance = ours.value - frozen.value
    parts = {"in all": distance, **parts, "rest": distance - sum(parts.values())}
    return [
        Row(
            what=f"distance: {part.replace('_', ' ')}",
            method=OURS,
            value=100 * ms / frozen.value,
            unit="%",
            model=ours.model,
            setting=ours.setting,
            n=ours.n,
        )
        for part, ms in parts.items()
    ]
