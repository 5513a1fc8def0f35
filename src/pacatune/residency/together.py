"""Weights whose columns come and go together: those whose deltas one optimiser changes.

torch calls back before and after each step of an optimiser. Whoever holds a weight by then, such as
an optimiser over all parameters, sees the pretrained columns in it; where nobody does, the columns
stay until the next pass writes newer ones over them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from pacatune.residency.watching import LOCK, DeltaParameter
from pacatune.residency.weight import Residency, restore_all

__all__ = ["Group"]


class Group:
    """Weights whose deltas one optimiser changes: their columns are written and restored together.

    On a GPU that is one launch for all of them, where each takes longer to launch than to run.
    """

    def __init__(self, members: list[Residency]) -> None:
        self.links = [member.link for member in members]
        # Somebody has looked at one since they were written, and will look at the next.
        self.is_looked_at = False

    def consists_of(self, members: list[Residency]) -> bool:
        """Whether these are the group."""
        return self.links == [member.link for member in members]

    def _members(self) -> Iterator[Residency]:
        return (member for link in self.links if (member := link()) is not None)  # type: ignore[misc]

    def waiting(
        self, first: Residency
    ) -> list[tuple[Residency, tuple[DeltaParameter, Tensor, float]]]:
        """Return the others whose columns have to be written anew, and by what."""
        self.is_looked_at = False
        found = []
        for member in self._members():
            written = member.written
            if written is None or member is first or member.is_alone or member.owner != first.owner:
                continue
            if written.delta.requires_grad and not member.holds(*written.parts):
                found.append((member, written.parts))
        return found

    def look(self) -> None:
        """Restore all, if somebody is looking at one after the other."""
        if self.is_looked_at:
            restore_all(list(self._members()))
        self.is_looked_at = True


def _deltas_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[DeltaParameter, Any]]:
    """Yield each delta of an optimiser and what its columns were last written by."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if type(parameter) is DeltaParameter:
                link = parameter.residency
                yield parameter, None if link is None else link()


def _before_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for _, residency in _deltas_of(optimizer):
        if residency is not None:
            residency.before_step()


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    found = []
    for delta, residency in _deltas_of(optimizer):
        delta.num_steps += 1
        delta.num_unversioned += 1  # fused optimisers count no versions
        if residency is not None:
            found.append(residency)
    found = list(dict.fromkeys(found))  # two adapters may be trained by turns
    with LOCK:
        over = [residency for residency in found if residency.is_over()]
        restore_all(over)
        for residency in over:
            residency.restore()  # or tell of what was changed meanwhile
        for residency in found:
            residency.is_stale = residency.is_written
    if found and (found[0].group is None or not found[0].group.consists_of(found)):
        group = Group(found)
        for residency in found:
            residency.group = group


register_optimizer_step_pre_hook(_before_optimizer_step)
register_optimizer_step_post_hook(_after_optimizer_step)
