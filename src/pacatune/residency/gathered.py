"""Weights of which each process has a part, and which FSDP2 gathers for a pass.

What stands in the module during a pass is a temporary copy of the whole weight. That is the only
thing that is written, and it is thrown away with the columns; the shards are never written.
"""

from functools import partial
from typing import Any

from pacatune.residency.obstacles import PLAIN
from pacatune.residency.put import Put, put
from pacatune.residency.together import Group
from pacatune.residency.watching import LOCK, alias_of, is_tracked, num_tensors_on
from pacatune.residency.weight import Residency

_GATHERED = Group()
"""The weights that FSDP2 shows now: those of one block, as a rule."""


class GatheredResidency(Residency):
    """The adapted columns of a weight that FSDP2 gathers; any residency may become one."""

    mesh: Any = None
    """Processes that have a part of the weight."""
    is_resharded = False
    """Whether FSDP2 cuts smaller parts from the temporary after a forward pass."""
    tracks = staticmethod(partial(is_tracked, is_gathered=True))

    def _forget(self) -> None:
        self.present, self.is_stale = None, False  # the temporary is thrown away as it is
        written = self.written  # another gathered weight is as good
        super()._forget()
        self.written = written

    def replace(self, weight: Any) -> None:
        """Make way for a gathered weight, or for the shards."""
        with LOCK:
            if type(weight) in PLAIN:
                if (kept := self.present) is not None:  # in the smaller parts, too
                    put([Put(kept._replace(memory=alias_of(weight)), None)])
                self._forget()
                # The buffer that it came in has the same memory.
                self.num_sharing = num_tensors_on(weight) - 1
                _GATHERED.add(self)
                return
            self._note_shards(weight)
            _GATHERED.discard(self)
            self.epoch += 1
            self.is_stale = self.is_written
            if not self.is_resharded:
                self._forget()

    def _note_shards(self, weight: Any) -> None:
        """See whether the parts are smaller now."""
        mesh = getattr(weight, "device_mesh", None)
        if mesh is None:
            super()._note_shards(weight)
        elif self.mesh is None:
            self.mesh = mesh
        elif mesh != self.mesh:
            self.is_resharded = True
            self.forbid("FSDP2 cuts smaller shards from its weight after the forward pass")

    def _together(self) -> Group:
        return _GATHERED

    def flaw(self, weight: Any) -> str | None:
        """Return why columns can never be there."""
        # Between two passes its shards are there, which are no obstacle to the next one.
        return None if type(weight) in PLAIN else ""

    def base(self) -> tuple[int, int]:
        """Tell no weight from another: they come from shards that nobody here can watch."""
        return 0, 1


Residency.of_shards = GatheredResidency
