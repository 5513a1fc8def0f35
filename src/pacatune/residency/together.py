"""Weights whose columns come and go together.

On a GPU that is one launch for all of them, where each takes longer to launch than to run.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pacatune.residency.weight import Residency

__all__ = ["Group"]


class Group:
    """Weights whose deltas one optimiser changes, or which FSDP2 has gathered by now."""

    def __init__(self, members: "Iterable[Residency]" = ()) -> None:
        self._links = dict.fromkeys(member.link for member in members)
        self._is_looked_at = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Group) and self._links == other._links

    def add(self, member: "Residency") -> None:
        """Take one in."""
        self._links[member.link] = None

    def discard(self, member: "Residency") -> None:
        """Leave one out."""
        self._links.pop(member.link, None)

    def members(self) -> "list[Residency]":
        """Return those that are there still."""
        return [member for link in self._links if (member := link()) is not None]

    def waiting(self, first: "Residency") -> "list[Residency]":
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
