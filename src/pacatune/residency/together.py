"""Weights whose columns come and go together.

On a GPU that is one launch for all of them, where each takes longer to launch than to run.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from pacatune.residency.put import Put, keep, put


class Group:
    """Weights whose deltas one optimiser changes, or which FSDP2 has gathered by now."""

    def __init__(self, members: Iterable[Any] = ()) -> None:
        self._links = dict.fromkeys(member.link for member in members)
        self._is_looked_at = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Group) and self._links == other._links

    def add(self, member: Any) -> None:
        """Take one in."""
        self._links[member.link] = None

    def discard(self, member: Any) -> None:
        """Leave one out."""
        self._links.pop(member.link, None)

    def members(self) -> list[Any]:
        """Return those that are there still."""
        return [member for link in self._links if (member := link()) is not None]

    def waiting(self, first: Any) -> list[Any]:
        """Return the others whose columns have to be written when those of the first one are."""
        self._is_looked_at = False
        return [
            member
            for member in self.members()
            if member is not first and member.owner == first.owner and member.is_waiting()
        ]

    def looks_on(self) -> bool:
        """Note a look at one; True if it was not the first one since the columns were written.

        Who looks at one weight after the other sees the rest next.
        """
        before, self._is_looked_at = self._is_looked_at, True
        return before


def put_all(moves: Sequence[tuple[Any, Put, Any]]) -> None:
    """Write columns into all weights, which are known to allow it; the caller holds the lock."""
    keep([kept for residency, (kept, _), _ in moves if kept is not residency.kept])
    epochs = [residency._begin(kept) for residency, (kept, _), _ in moves]
    put([move for _, move, _ in moves])
    for (residency, (kept, _), written), epoch in zip(moves, epochs, strict=True):
        residency._end(kept, written, epoch)


def restore_all(residencies: Iterable[Any]) -> None:
    """Put the pretrained columns back wherever nobody has changed the weight since.

    The caller holds the lock.
    """
    found = [(r, kept) for r in residencies if (kept := r.present) is not None and r.is_unchanged()]
    for residency, _ in found:
        residency.is_stale = True
        residency.epoch += 1  # last, as in `_begin`
    with torch.inference_mode(False):
        put([Put(kept, None) for _, kept in found])
    for residency, _ in found:
        residency.present, residency.is_stale = None, False
