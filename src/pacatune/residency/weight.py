"""The state of one weight: which columns are in it, what they overwrote, and who may change that.

`pacatune.residency` says what for, and by which rules.
"""

import math
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pacatune.ops.columns import Update, check_columns, read_columns, with_columns
from pacatune.residency.obstacles import NUM_OWN_REFERENCES, PLAIN, flaw_of, why_not_written
from pacatune.residency.put import Kept, Put, is_on_gpu, room_for
from pacatune.residency.together import Group, put_all, restore_all
from pacatune.residency.watching import (
    LOCK,
    WeightParameter,
    alias_of,
    guard,
    is_tracked,
)


class Written(NamedTuple):
    """An update at one moment: equal ones mean the same columns."""

    update: Update
    """What is trained of it are DeltaParameters."""
    version: int
    """The versions of delta and mix together: each only grows."""
    num_unversioned: int
    indices_version: int

    @classmethod
    def now(cls, update: Update) -> "Written":
        """Return what the columns are of at this moment."""
        delta, mix = update.delta, update.mix
        version, num_unversioned = delta._version, delta.num_unversioned
        if mix is not None:
            version, num_unversioned = version + mix._version, num_unversioned + mix.num_unversioned
        return cls(update, version, num_unversioned, update.indices._version)

    def is_of(self, update: Update) -> bool:
        """Whether nothing has changed since."""
        delta, indices, scaling, mix = update
        own = self.update
        version = delta._version
        # Swapped with another (torch.__future__) it has no such number.
        num_unversioned = getattr(delta, "num_unversioned", math.nan)
        if mix is not None:
            version += mix._version
            num_unversioned += getattr(mix, "num_unversioned", math.nan)
        return (
            delta is own.delta
            and mix is own.mix
            and version == self.version
            and num_unversioned == self.num_unversioned
            and indices is own.indices
            and indices._version == self.indices_version
            and scaling == own.scaling
        )


class Residency:
    """The adapted columns of one module's weight: at most one adapter's, written on demand.

    Args:
        module: Holds the frozen (O, I) weight in its parameter dictionary.
    """

    of_shards: "type[Residency]"
    """What it becomes where each process has a part of the weight: `GatheredResidency`."""
    # Where the weight's memory is: `weight.data = other` changes nothing else.
    _address_of: Callable[[Tensor], int] = staticmethod(Tensor.data_ptr)
    _check_columns: Callable[[Tensor, int, str], None] = staticmethod(check_columns)
    tracks: Callable[[Tensor], bool] = staticmethod(is_tracked)

    def __init__(self, module: nn.Module) -> None:
        # Why nothing is ever written from now on, whatever else happens.
        self.forbidden: str | None = None
        self.is_merged = False
        # Changes by merging and unmerging, which are not the base's. Kept while another weight is
        # there for a while (torch.func.functional_call).
        self.num_own_versions = 0
        # How many tensors besides the weight itself are known to share its memory.
        self.num_sharing = 0
        # What a write has overwritten, from before it until after it is restored.
        self.present: Kept | None = None
        # At any time; compiled graphs then ask when they run.
        self.was_written = False
        # Written, but perhaps in part, or an optimiser step has passed since.
        self.is_stale = False
        # Somebody changed the weight while columns were in it, and has been told so.
        self.is_lost = False
        # Grows before the weight, or its columns, change.
        self.epoch = 0
        # The thread that may write although it does not train.
        self.owner: int | None = None
        # Those that one optimiser changes together with this one.
        self.group: Group | None = None
        # The thread that looked last, and may hold what it saw.
        self.looker: int | None = None
        self.link = weakref.ref(self)
        self.parameters = guard(module, self.link)
        # The last indices, their version, and a copy.
        self.columns: tuple[Tensor, int, Tensor] | None = None
        self._forget()
        self._note_shards(dict.get(self.parameters or {}, "weight"))

    @property
    def is_written(self) -> bool:
        """Whether columns may be in the weight."""
        return self.present is not None

    def _forget(self) -> None:
        self.weight: Tensor | None = None
        self.weight_version = -1
        self.address = 0
        self.written_base = 0, 0
        self.is_on_gpu = False
        self.kept: Kept | None = None
        # What was written last, and will be again, as a rule.
        self.written: Written | None = None

    def holds(self, update: Update) -> bool:
        """Whether W holds W[:, indices] + scaling * delta for the current values of delta."""
        if self.present is None or self.is_stale:
            return False
        weight: Any = self.weight
        return (
            self.written.is_of(update)  # type: ignore[union-attr]
            and weight._version == self.weight_version
            and self._address_of(weight) == self.address
            and not weight.requires_grad
            and not (self.is_on_gpu and _is_capturing())
        )

    def write(self, update: Update) -> bool:
        """Make sure that W holds W[:, indices] + scaling * delta; costs next to nothing if it does.

        Returns:
            False if W must not be written now; it then holds the pretrained columns.

        Raises:
            RuntimeError: If somebody changed the weight in place while columns were in it.
        """
        with LOCK, torch.inference_mode(False):
            if self.holds(update):
                return True
            first = self._prepare(update)
            if first is None:
                return False
            group = self._together()
            others = [] if group is None else group.waiting(self)
            moves = [first, *[member._prepare(member.written.update) for member in others]]
            put_all([move for move in moves if move is not None])
            return self.holds(update)

    def originals(self, indices: Tensor) -> Tensor | None:
        """Return the pretrained columns, (O, U), which the caller must not change.

        Nothing that is up to date is written back for it; None where there is no plain weight.
        """
        with LOCK:
            weight, kept = self.find_weight(), self.kept
            if weight is None:
                return None
            if kept is not None and self._knows(indices) and self.is_unchanged():
                return kept.originals
            self.restore()
            return read_columns(weight.detach(), indices)

    def is_waiting(self) -> bool:
        """Whether training will write columns here before it computes with them."""
        if self.written is None:
            return False
        last = self.written.update
        return (
            bool(last.delta.requires_grad)
            and bool(last.delta.untyped_storage().nbytes())  # FSDP2 empties what it took away
            and not self.holds(last)
        )

    def _prepare(self, update: Update) -> "tuple[Residency, Put, Written] | None":
        """Return a write, with room for what it overwrites; None if nothing must be written."""
        if self.obstacle(update) is not None:
            self.restore()
            return None
        kept = self.kept
        if kept is None or not self._knows(update.indices):
            self.restore()
            self.kept = None
            kept = self._make_room(update.indices)
        return self, Put(kept, update), Written.now(update)

    def _begin(self, kept: Kept) -> int:
        """Note that columns are about to change; `restore` then knows what to do, interrupted."""
        epoch = self.epoch + 1  # a look between the next lines makes it more
        # The epoch last: who reads the new one sees the rest, too.
        self.is_stale = self.was_written = True
        self.present = kept
        self.epoch += 1
        return epoch

    def _end(self, kept: Kept, written: Written, epoch: int) -> None:
        # A signal handler has looked, and knows of no columns any more.
        if self.epoch != epoch or self.present is None:
            self.present = kept
            self.restore()
            return
        self.kept = kept
        self.written = written
        written.update.delta.residency = self.link
        if written.update.mix is not None:
            written.update.mix.residency = self.link
        self.is_stale = False

    def _make_room(self, indices: Tensor) -> Kept:
        assert self.weight is not None
        if self.columns is None or not self._knows(indices):
            self._check_columns(indices, self.weight.shape[1], "`indices`")
            self.columns = indices, indices._version, indices.clone()
        kept = room_for(alias_of(self.weight), self.columns[2])
        self._watch(self.weight)
        self.weight_version, self.address = self.weight._version, self._address_of(self.weight)
        self.written_base = self.base()
        self.is_on_gpu = is_on_gpu(self.weight)
        return kept

    def _knows(self, indices: Tensor) -> bool:
        """Whether `kept` is of these columns: they may have been reloaded in place."""
        known = self.columns
        return known is not None and known[0] is indices and known[1] == indices._version

    def _watch(self, weight: Tensor) -> None:
        """Notice the use of the weight's `.data` from now on."""
        if type(weight) is nn.Parameter:
            weight.__class__ = WeightParameter
        weight.residency = self.link  # type: ignore[attr-defined]

    def find_weight(self) -> Tensor | None:
        """Return the module's weight if it is a plain frozen one; writing it may be forbidden."""
        if self.parameters is None:
            return None
        weight: Any = dict.get(self.parameters, "weight")
        if weight is not self.weight:
            with LOCK:
                self.restore()
                self._forget()
                if self.flaw(weight) is None:
                    self.weight = weight
        return None if self.weight is None or self.weight.requires_grad else self.weight

    def replace(self, weight: Any) -> None:
        """Make way for another weight in the module."""
        with LOCK:
            self.look()
            self._note_shards(weight)

    def _note_shards(self, weight: Any) -> None:
        """See whether each process has a part of the weight from now on."""
        # A plain tensor stands there while torch.func.functional_call runs.
        if weight is None or type(weight) in (*PLAIN, Tensor):
            return
        if hasattr(weight, "device_mesh"):
            self.__class__ = self.of_shards
            self._note_shards(weight)
        else:  # quantised
            self.forbid("its weight is no plain parameter")

    def _together(self) -> Group | None:
        """Return those whose columns come and go with these."""
        return self.group

    def flaw(self, weight: Any) -> str | None:
        """Return why columns can never be in what stands there, frozen or not."""
        return flaw_of(weight)

    obstacle = why_not_written

    def forbid(self, reason: str) -> None:
        """Never write from now on; what is written stays until somebody reads it."""
        self.forbidden = self.forbidden or reason

    def note_sharing(self) -> None:
        """Leave the pretrained weight to another module that uses it as well (tied embeddings)."""
        self.restore()
        self.forbid("another module uses the same weight")

    def note_capture(self) -> None:
        """Leave the pretrained weight to a graph that reads it whenever it runs."""
        # What an exporter puts in the weight's place has forbidden it already, for no good reason.
        self.forbidden = "a CUDA graph or an exported graph reads its weight"

    def refuse_capture(self, weight: Tensor) -> None:
        """Leave the pretrained weight to a CUDA graph, which reads it at every replay.

        Raises:
            RuntimeError: If columns are in the weight: restoring them now would be recorded, too.
        """
        if not (is_on_gpu(weight) and _is_capturing()):
            return
        if self.is_written:
            raise RuntimeError(
                "A CUDA graph is being captured while adapted columns are in the weights, which it "
                "would read at every replay. Call `model.zero_grad()` before the capture: any look "
                "at the parameters puts the pretrained columns back."
            )
        self.note_capture()

    def is_unchanged(self) -> bool:
        """Whether nobody has changed the weight since columns were put into it."""
        return (
            self.weight is not None
            and self.weight._version == self.weight_version
            and self._address_of(self.weight) == self.address
        )

    def refuse_changed(self) -> None:
        """Refuse to go on if somebody changed the weight in place while columns were in it."""
        if self.is_written:
            self.is_lost = True
            raise RuntimeError(
                "The base weight was changed in place while its adapted columns were in it, so "
                "nobody can tell what is pretrained. Load the base again, and reach its weight "
                "through its module (`layer.base_layer.weight`), which puts the pretrained columns "
                "back first."
            )

    def restore(self) -> None:
        """Put the pretrained columns back, bit for bit, if they are not there.

        Raises:
            RuntimeError: If somebody changed the weight in place while columns were in it.
        """
        if self.present is None:
            return
        with LOCK:
            if not self.is_unchanged():
                self.refuse_changed()
            restore_all([self])

    def restore_together(self, *, only_stale: bool = False) -> None:
        """Restore all whose columns come and go with these, or are old as well, by one launch."""
        with LOCK:
            if self.is_written and (group := self._together()) is not None:
                restore_all(m for m in group.members() if m.is_stale or not only_stale)
            self.restore()

    def pretrained_weight(self) -> Tensor:
        """Return the (O, I) pretrained weight as a copy, for traced graphs: they must not write."""
        assert self.weight is not None
        assert self.kept is not None
        return with_columns(self.weight, self.kept.columns, self.kept.originals)

    def look(self, *, at_data: bool = False) -> None:
        """Restore for somebody who may change what he sees, with `at_data` uncounted."""
        with LOCK:
            group = self._together()
            if self.is_written and group is not None and group.looks_on():
                self.restore_together()
            self.restore()
            if self.kept is not None and (at_data or _is_numpys(self.kept.memory)):
                self.kept = None
            self.looker = threading.get_ident()

    def is_over(self) -> bool:
        """Whether columns have to go after an optimiser's step.

        They have if somebody holds the weight, or if nobody has used them since the last step.
        """
        return self.is_written and (
            self.is_stale or sys.getrefcount(self.weight) > NUM_OWN_REFERENCES
        )

    def merging(self) -> None:
        """Make way for a merge: from here on, W belongs to it."""
        with LOCK:
            self.look()
            self.is_merged = True
            self.epoch += 1  # last, as in `_begin`

    def unmerged(self) -> None:
        """Note that the pretrained columns are back."""
        if self.is_merged:
            with LOCK:
                self.epoch += 1
                self.is_merged = False

    def base(self) -> tuple[int, int]:
        """Tell one pretrained weight from another: what is there, and where."""
        weight = self.weight
        if weight is None:
            return -self.num_own_versions, 0
        return weight._version - self.num_own_versions, self._address_of(weight)

    def close(self) -> None:
        """Leave the pretrained weight to the module, for good."""
        with LOCK:
            self.restore()
            self.forbid("the layer has been handed back")
            weight: Any = dict.get(self.parameters or {}, "weight")
            if type(weight) is WeightParameter:  # of a copied model, perhaps never written
                weight.residency = None
                weight.__class__ = nn.Parameter  # type: ignore[assignment]

    def __del__(self) -> None:
        if self.is_written and not self.is_lost and sys is not None and not sys.is_finalizing():
            # Garbage is collected at any time: perhaps while a compiler runs on fake tensors, or
            # within a transform of torch.func.
            no_modes = torch.utils._python_dispatch._disable_current_modes()
            with no_modes, torch._C._DisableFuncTorch():
                self.restore()


def _is_numpys(memory: Tensor) -> bool:
    """Whether numpy can change it, which no version counter notices."""
    return memory.is_cpu


def _is_capturing() -> bool:
    """Whether a CUDA graph is being recorded."""
    return torch.cuda.is_current_stream_capturing()
