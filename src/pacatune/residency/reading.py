"""How a pass computes with a weight whose columns others may change meanwhile.

No lock is held while it does. Who changes the weight makes its `epoch` grow first; a pass that
finds it grown computes again.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from pacatune.ops.columns import Update
from pacatune.residency.put import in_turn, is_aside
from pacatune.residency.watching import LOCK
from pacatune.residency.weight import Residency

Result = TypeVar("Result")


def read(
    residency: Residency,
    compute: Callable[[Tensor, bool], Result],
    update: Update,
    *,
    writes: bool,
) -> Result | None:
    """Compute with the weight; again if somebody changes its columns meanwhile.

    Args:
        residency: Of the weight.
        compute: Takes the (O, I) weight, and whether it holds the adapted columns; if not, it
            holds the pretrained ones.
        update: Whose columns those are.
        writes: Whether the columns may be written into the weight.

    Returns:
        What `compute` returns; None if there is no weight here that could be used like this.

    Raises:
        RuntimeError: If somebody changed the weight in place while columns were in it.
    """
    while True:
        epoch = residency.epoch
        if is_resident := residency.holds(update):
            weight: Any = residency.weight
        elif (state := _open(residency, update, writes)) is None:
            return None
        else:
            weight, is_resident, epoch = state
        run = in_order(compute) if is_aside(weight) else compute
        result = run(weight, is_resident)
        if residency.epoch == epoch:
            return result
        # Another thread looks; he that looks again and again must not keep us from ending.
        writes = False


def in_order(compute: Callable[[Tensor, bool], Result]) -> Callable[[Tensor, bool], Result]:
    """Let a computation see a weight as it is for the host, whatever streams others work on."""

    def compute_in_turn(weight: Tensor, is_resident: bool) -> Result:
        with in_turn(weight):
            return compute(weight, is_resident)

    return compute_in_turn


def read_pretrained(residency: Residency, compute: Callable[[Tensor, bool], Result]) -> Result:
    """Compute with the pretrained weight, as `read` does."""
    while True:
        with LOCK:
            residency.restore()
            weight, epoch = residency.find_weight(), residency.epoch
        assert weight is not None
        result = in_order(compute)(weight, False)
        if residency.epoch == epoch:
            return result


def _open(residency: Residency, update: Update, writes: bool) -> tuple[Tensor, bool, int] | None:
    """Return the weight, whether it holds the columns, and since which epoch."""
    epoch, weight = residency.epoch, residency.find_weight()
    if weight is None or residency.is_merged:
        return None
    residency.refuse_capture(weight)
    if not writes and not residency.is_written:
        return weight, False, epoch
    del weight  # to a write it would look like somebody else's
    with LOCK:
        if not (writes and residency.write(update)):
            residency.restore_together(only_stale=True)
        # Asked again, since a signal handler may have looked in between.
        weight, epoch = residency.find_weight(), residency.epoch
        if weight is None:
            return None
        return weight, residency.holds(update), epoch
