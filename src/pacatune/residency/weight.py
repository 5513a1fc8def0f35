"""Keeps adapted columns inside a frozen weight; whoever looks sees the pretrained ones.

PaCA is fast because the adapted columns sit in W itself: one GEMM, nothing beside it. The price is
that W is not the pretrained weight while they do. This module pays it, and no other module writes
to a base weight during training.

    write     W[:, indices] <- originals + scaling * delta    in a training pass, if delta changed
    restore   W[:, indices] <- originals                      before anybody else reads W

Three rules:
  * **Evaluation never writes.** A pass that trains (forward with a delta that asks for a gradient,
    and its backward), and a thread inside `resident(model)`, may write columns; a few comparisons
    say whether they are there already, so that is once per optimiser step, never per micro-batch.
    Every other pass reads W as it is: W' if the current columns are in it, otherwise the pretrained
    weight, to whose product it adds that of the columns. Any number of threads may do so.
  * **Who computes with W checks afterwards** that nobody changed its columns meanwhile (`epoch`),
    and otherwise computes again: no lock is held while a GEMM runs. Who changes them, or hands W
    out, holds the one lock.
  * **Nobody keeps W'.** A backward pass takes W from here and not from what its forward saved,
    which a hook may have copied, and brings it into the state that it needs.

Who may see W, and how each is served:
  * Everybody who reaches W through its module (attribute, parameters(), state_dict, deepcopy,
    pickle, .to(), FSDP) goes through the module's parameter dictionary, which restores before it
    answers (`watching.GuardedParameters`); so does the `.data` of a Parameter object.
  * Whoever already holds the Parameter object (an optimiser over all parameters, DDP) sees the
    pretrained weight again after every optimiser step, through torch's step hook. If nobody holds
    it, that write is saved. If another thread got hold of it, it is not written until he lets go.
  * While somebody holds another tensor over the same memory (the values of a state_dict, say), or
    a graph holds the weight (a traced one, or plain autograd's), or another process shares its
    memory, nothing is written, and the layer adds the product of its columns.

  * FSDP2 shows a temporary that it gathers for a pass: that is what is written, and what is thrown
    away with the columns. Its shards are never written.

How a change of delta is noticed: its version counter (in-place arithmetic, load_state_dict), and
what `watching.DeltaParameter` counts besides (optimiser steps, since fused ones count no versions,
and uses of `.data`), its identity and scaling (another adapter).

Writes go through an alias of W with a version counter of its own, so autograd's saved-tensor check
never trips on them. Deltas, not columns, are what is trained: an untrained delta writes nothing but
the original bits.
"""

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from pacatune.ops.linear import adapted_columns
from pacatune.residency.exchange import Exchange, can_exchange, exchange
from pacatune.residency.watching import (
    LOCK,
    DeltaParameter,
    Watcher,
    WeightParameter,
    alias_of,
    guard,
    is_tracked,
    num_tensors_on,
    owns_its_memory,
)

__all__ = ["Pass", "Residency", "resident"]

Result = TypeVar("Result")


_Parts = tuple[DeltaParameter, Tensor, float]


class _Kept(NamedTuple):
    """What a write overwrites, and where."""

    indices: Tensor
    """The adapter's own, known by identity."""
    columns: Tensor
    """(R,) copy of them, since the adapter's own may be reloaded."""
    originals: Tensor
    """(O, R) in the weight's dtype."""
    positions: Tensor | None
    """(O, R) theirs in the flat memory, where worth keeping."""
    memory: Tensor
    """An alias of the weight: writes through it pass autograd's version check."""


class _Update(NamedTuple):
    """A delta at one moment: equal ones mean the same columns."""

    delta: DeltaParameter
    version: int
    num_unversioned: int
    indices: Tensor
    scaling: float

    @property
    def parts(self) -> _Parts:
        """The layer's delta, indices and scaling."""
        return self.delta, self.indices, self.scaling

    def is_of(self, delta: Any, indices: Tensor, scaling: float) -> bool:
        return (
            delta is self.delta
            and delta._version == self.version
            and delta.num_unversioned == self.num_unversioned
            and indices is self.indices
            and scaling == self.scaling
        )


class _Move(NamedTuple):
    """A write: what to put into which weight, and what it overwrites."""

    residency: "Residency"
    kept: _Kept
    update: _Update


class _Added(NamedTuple):
    """What the columns add to the product of the pretrained weight, and of what."""

    update: _Update
    base: tuple[int, int]
    columns: Tensor


def _update(delta: Any, indices: Tensor, scaling: float) -> _Update:
    return _Update(delta, delta._version, delta.num_unversioned, indices, scaling)


class Residency:
    """The adapted columns of one module's weight: at most one adapter's, written on demand.

    Args:
        module: Holds the frozen (O, I) weight in its parameter dictionary.
    """

    def __init__(self, module: nn.Module) -> None:
        # Another module sees the weight as well (tied embeddings): never write.
        self.is_shared = False
        # Each process has a part of the weight (FSDP2). What stands in the module during a pass is
        # a temporary copy, the only thing that is written; it is thrown away with the columns.
        self.is_sharded = False
        self.mesh: Any = None
        # FSDP2 cuts smaller parts from the temporary after a forward pass: read only.
        self.is_resharded = False
        # A tensor of another kind stands there, or has stood (quantised weights): read only.
        self.is_foreign = False
        # A CUDA graph, or an exported one, reads the memory whenever it runs: read only.
        self.is_captured = False
        # The module has been handed back without the adapter: read only.
        self.is_closed = False
        self.is_merged = False
        # How many tensors besides the weight itself are known to share its memory.
        self.num_sharing = 0
        # What a write has overwritten, from before it until after it is restored.
        self.present: _Kept | None = None
        # At any time; compiled graphs then ask when they run.
        self.was_written = False
        # Written, but perhaps in part, or an optimiser step has passed since.
        self.is_stale = False
        # Somebody changed the weight while columns were in it, and has been told so.
        self.is_lost = False
        # Grows before the weight, or its columns, change.
        self.epoch = 0
        # The thread that may write although it does not train, and the last one that trained.
        self.owner: int | None = None
        self.trainer: int | None = None
        # Those that one optimiser changes together with this one, and whether this one stays apart.
        self.group: _Group | None = None
        self.is_alone = False
        # Somebody has used the weight's `.data`, and may have changed it by that.
        self.is_data_used = False
        # The thread that looked last, and may hold what it saw.
        self.looker: int | None = None
        self.link: weakref.ref[Watcher] = weakref.ref(self)
        self.parameters = guard(module, self.link)
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
        # Changes of the weight by merging, which unmerging has taken back.
        self.version_before_merge = self.num_own_versions = 0
        self.kept: _Kept | None = None
        self.written: _Update | None = None
        self.claimed: tuple[DeltaParameter, int] | None = None
        self.added: _Added | None = None

    def read(
        self,
        compute: Callable[[Tensor, bool], Result],
        delta: Tensor,
        indices: Tensor,
        scaling: float,
        *,
        writes: bool,
    ) -> Result | None:
        """Compute with the weight; again if somebody changes its columns meanwhile.

        Args:
            compute: Takes the (O, I) weight, and whether it holds the adapted columns; if not, it
                holds the pretrained ones.
            delta: (O, R) update, an nn.Parameter.
            indices: (R,) int64, fixed from here on: in-place edits are not noticed.
            scaling: Factor between `delta` and the columns.
            writes: Whether the columns may be written into the weight.

        Returns:
            What `compute` returns; None if there is no weight here that could be used like this.

        Raises:
            RuntimeError: If somebody changed the weight in place while columns were in it.
        """
        state = self._open(delta, indices, scaling, writes)
        while state is not None:
            weight, is_resident, epoch = state
            result = compute(weight, is_resident)
            if self.epoch == epoch:
                return result
            # Another thread looks; he that looks again and again must not keep us from ending.
            state = self._open(delta, indices, scaling, writes=False)
        return None

    def read_pretrained(self, compute: Callable[[Tensor, bool], Result]) -> Result:
        """Compute with the pretrained weight, as `read` does."""
        while True:
            with LOCK:
                self.restore()
                weight, epoch = self.find_weight(), self.epoch
            assert weight is not None
            result = compute(weight, False)
            if self.epoch == epoch:
                return result

    def _open(
        self, delta: Tensor, indices: Tensor, scaling: float, writes: bool
    ) -> tuple[Tensor, bool, int] | None:
        epoch = self.epoch
        if self.holds(delta, indices, scaling):
            return self.weight, True, epoch  # type: ignore[return-value]
        weight = self.find_weight()
        if weight is None or self.is_merged:
            return None
        if _is_on_gpu(weight) and _is_capturing():
            self._capture()
        if not writes and not self.is_written:
            return weight, False, epoch
        del weight  # to a write it would look like somebody else's
        with LOCK:
            if not (writes and self.write(delta, indices, scaling)):
                self.restore()
            # Asked again, since a signal handler may have looked in between.
            weight, epoch = self.find_weight(), self.epoch
            if weight is None:
                return None
            return weight, self.holds(delta, indices, scaling), epoch

    def holds(self, delta: Tensor, indices: Tensor, scaling: float) -> bool:
        """Whether W holds W[:, indices] + scaling * delta for the current values of delta."""
        if self.present is None or self.is_stale:
            return False
        weight: Any = self.weight
        return (
            self.written.is_of(delta, indices, scaling)  # type: ignore[union-attr]
            and weight._version == self.weight_version
            and self._address_of(weight) == self.address
            and not weight.requires_grad
            and not (_is_on_gpu(weight) and _is_capturing())
        )

    def write(self, delta: Tensor, indices: Tensor, scaling: float) -> bool:
        """Make sure that W holds W[:, indices] + scaling * delta; costs next to nothing if it does.

        Args:
            delta: (O, R) update, an nn.Parameter.
            indices: (R,) int64, fixed from here on: in-place edits are not noticed.
            scaling: Factor between `delta` and the columns.

        Returns:
            False if W must not be written now; it then holds the pretrained columns.

        Raises:
            RuntimeError: If somebody changed the weight in place while columns were in it.
        """
        with LOCK:
            if self.holds(delta, indices, scaling):
                return True
            if not torch.is_inference_mode_enabled():
                return self._write(delta, indices, scaling)
            with torch.inference_mode(False):
                return self._write(delta, indices, scaling)

    def _write(self, delta: Tensor, indices: Tensor, scaling: float) -> bool:
        moves = [self._prepare(delta, indices, scaling)]
        if self.group is not None and moves[0] is not None:
            moves += [member._prepare(*parts) for member, parts in self.group.waiting(self)]
        _put_updates([move for move in moves if move is not None])
        return self.holds(delta, indices, scaling)

    def _prepare(self, delta: Tensor, indices: Tensor, scaling: float) -> "_Move | None":
        """Copy aside what a write would overwrite; None, and nothing written, if it must not be."""
        if not self._may_write(delta):
            self.restore()
            return None
        kept = self.kept
        if kept is None or indices is not kept.indices:
            self.restore()
            self.kept = None
            kept = self._copy_aside(indices)
        return _Move(self, kept, _update(delta, indices, scaling))

    def _begin(self, kept: _Kept) -> int:
        """Note that columns are about to change; `restore` then knows what to do, interrupted."""
        self.added = None
        self.epoch += 1
        epoch = self.epoch  # a look between the next two lines changes it
        self.is_stale = self.was_written = True
        self.present = kept
        return epoch

    def _end(self, move: "_Move", epoch: int) -> None:
        if self.epoch != epoch:  # a signal handler has looked, and knows of no columns any more
            self.present = move.kept
            self.restore()
            return
        self.kept, self.written = move.kept, move.update
        move.update.delta.residency = self.link
        self.is_stale = False

    def claim(self, delta: Any) -> None:
        """Note that a training pass wants the columns of `delta` to be in the weight."""
        if not self.is_claimed(delta) and self._tracks(delta):
            self.claimed = delta, delta.num_steps

    def is_claimed(self, delta: Any) -> bool:
        """Whether one has since the last optimiser step."""
        if self.claimed is None:
            return False
        claimed, num_steps = self.claimed
        return claimed is delta and delta.num_steps == num_steps

    def _copy_aside(self, indices: Tensor) -> _Kept:
        assert self.weight is not None
        memory = alias_of(self.weight)
        originals = memory.index_select(1, indices)
        columns, positions = indices.clone(), None
        if _is_flat(memory) and originals.numel() <= _MAX_KEPT_POSITIONS:
            positions = _flat_positions(memory, columns)
        self._watch(self.weight)
        self.weight_version, self.address = self.weight._version, self._address_of(self.weight)
        return _Kept(indices, columns, originals, positions, memory)

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
                if type(weight) in _PLAIN and (self.is_sharded or _is_ordinary(weight)):
                    self.weight = weight
        return None if self.weight is None or self.weight.requires_grad else self.weight

    def replace(self, weight: Any) -> None:
        """Make way for another weight in the module."""
        with LOCK:
            if not self.is_sharded:
                self.look()
                self._note_shards(weight)
            elif type(weight) in _PLAIN:
                self._gathered(weight)
            else:
                self._note_shards(weight)
                self.epoch += 1
                self.is_stale = self.is_written
                if not self.is_resharded:  # the temporary is thrown away as it is
                    self.present, self.is_stale = None, False
                    self._forget()

    def _gathered(self, weight: Tensor) -> None:
        if (kept := self.present) is not None:  # in the smaller parts, too
            _put_columns_(alias_of(weight), kept.columns, kept.originals, None)
        self.present, self.is_stale = None, False
        self._forget()
        # The buffer that it came in has the same memory.
        self.num_sharing = num_tensors_on(weight) - 1

    def _note_shards(self, weight: Any) -> None:
        """See whether each process has a part of the weight, and whether that is smaller now."""
        # A plain tensor stands there while torch.func.functional_call runs.
        if weight is None or type(weight) in (*_PLAIN, Tensor):
            return
        mesh = getattr(weight, "device_mesh", None)
        if mesh is None:
            self.is_foreign = True
            return
        self.is_resharded |= self.is_sharded and mesh != self.mesh
        if not self.is_sharded:
            self.is_sharded, self.mesh = True, mesh

    def _may_write(self, delta: Tensor) -> bool:
        """Whether W is ours alone to write, and every change of `delta` will be noticed."""
        return self.obstacle(delta) is None

    def obstacle(self, delta: Tensor) -> str | None:
        """Return why the columns must not be written into W now; None if they may.

        Args:
            delta: (O, R), whose every change will have to be noticed.

        Raises:
            RuntimeError: If somebody changed the weight in place while columns were in it.
        """
        if not self.is_writable():
            return self._what_forbids()
        weight = self.find_weight()
        if weight is None:
            return self._what_is_there()
        if self.is_merged:
            return "an adapter is merged into its weight"
        if delta.device != weight.device:
            return f"its weight is on {weight.device}, its update on {delta.device}"
        if weight.is_cpu and weight.is_shared():
            return "its weight is in memory that processes share"
        if self.kept is not None and not self._is_unchanged(weight):
            self._refuse_changed()
            self.kept = None
        if weight._use_count() > 1:  # type: ignore[attr-defined]
            return "an autograd graph holds its weight"
        num_others = num_tensors_on(weight) - (1 if self.kept is None else 2)
        if num_others > self.num_sharing:
            return "somebody holds a tensor in the memory of its weight"
        thread = threading.get_ident()
        if self.looker not in (None, thread):
            del weight
            if sys.getrefcount(self.weight) > _NUM_OWN_REFERENCES:
                return "another thread holds its weight"
            self.looker = None
        if not self._tracks(delta):
            return "somebody holds the `.data` of its update, or that is no plain parameter"
        return None

    def _what_forbids(self) -> str:
        if self.is_shared:
            return "another module uses the same weight"
        if self.is_captured:
            return "a CUDA graph or an exported graph reads its weight"
        if self.is_foreign:
            return "its weight is no plain parameter"
        if self.is_resharded:
            return "FSDP2 cuts smaller shards from its weight after the forward pass"
        return "the layer has been handed back"

    def _what_is_there(self) -> str | None:
        weight: Any = dict.get(self.parameters or {}, "weight")
        if type(weight) not in _PLAIN:
            return None if self.is_sharded else "its weight is no plain parameter"
        if weight.requires_grad:
            return "its weight is trained itself"
        if weight.is_meta:
            return "its weight has no values yet"
        if weight.is_inference():
            return "its weight was made in inference mode"
        return "its weight is a view into a larger buffer"

    def _tracks(self, delta: Tensor) -> bool:
        return is_tracked(delta, is_gathered=self.is_sharded)

    def is_writable(self) -> bool:
        """False where nothing is ever written from now on, whatever else happens."""
        return not (
            self.is_shared
            or self.is_resharded
            or self.is_foreign
            or self.is_captured
            or self.is_closed
        )

    def _capture(self) -> None:
        """Leave the pretrained weight to a CUDA graph, which reads it at every replay.

        Raises:
            RuntimeError: If columns are in the weight: restoring them now would be recorded, too.
        """
        if self.is_written:
            raise RuntimeError(
                "A CUDA graph is being captured while adapted columns are in the weights, which it "
                "would read at every replay. Call `model.zero_grad()` before the capture: any look "
                "at the parameters puts the pretrained columns back."
            )
        self.is_captured = True

    @staticmethod
    def _address_of(weight: Tensor) -> int:
        """Where the weight's memory is: `weight.data = other` changes nothing else."""
        return weight.data_ptr()

    def _is_unchanged(self, weight: Tensor) -> bool:
        return weight._version == self.weight_version and self._address_of(weight) == self.address

    def is_unchanged(self) -> bool:
        """Whether nobody has changed the weight since columns were put into it."""
        return self.weight is not None and self._is_unchanged(self.weight)

    def _refuse_changed(self) -> None:
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
            if (kept := self.present) is not None:  # still
                self._restore(kept)

    def _restore(self, kept: _Kept) -> None:
        assert self.weight is not None
        if not self._is_unchanged(self.weight):
            self._refuse_changed()
        self.epoch += 1
        self.is_stale = True
        with torch.inference_mode(False):
            _put_columns_(kept.memory, kept.columns, kept.originals, kept.positions)
        self.present = None
        self.is_stale = False

    def addition(
        self,
        compute: Callable[[], Tensor],
        dtype: torch.dtype,
        delta: Any,
        indices: Tensor,
        scaling: float,
    ) -> Tensor:
        """Return what the columns of W' are beyond those of W, as long as it stays the same.

        Args:
            compute: Returns it; to be called where the pretrained weight is being read.
            dtype: The result's dtype.
            delta: (O, R) update.
            indices: (R,) int64.
            scaling: Factor between `delta` and the columns.
        """
        # A captured graph would read, at every replay, memory that is no longer there.
        added = None if self.is_captured else self.added
        base = self.base()
        if (
            added is not None
            and added.base == base
            and added.columns.dtype == dtype
            and added.update.is_of(delta, indices, scaling)
        ):
            return added.columns
        epoch, update = self.epoch, None
        if not self.is_captured and self._tracks(delta):
            update = _update(delta, indices, scaling)
        with torch.inference_mode(False), torch.no_grad():
            columns = compute().to(dtype)
        with LOCK:
            if update is not None and self.epoch == epoch and not self.is_written:
                if self.weight is not None:
                    self._watch(self.weight)
                self.added = _Added(update, base, columns)
        return columns

    def pretrained_weight(self) -> Tensor:
        """Return the (O, I) pretrained weight as a copy, for traced graphs: they must not write."""
        assert self.weight is not None
        assert self.kept is not None
        return self.weight.index_copy(1, self.kept.columns, self.kept.originals)

    def look(self) -> None:
        """Restore for somebody who may change what he sees."""
        with LOCK:
            group = self.group
            if self.is_written and group is not None:
                group.look()
            self.restore()
            if self.kept is not None and (self.is_data_used or _is_numpys(self.kept.memory)):
                self.kept = None
            self.added, self.is_data_used = None, False
            self.looker = threading.get_ident()

    def before_step(self) -> None:
        """Restore if the optimiser may change the weight as well: one that has a gradient."""
        if self.is_written and self.weight.grad is not None:  # type: ignore[union-attr]
            self.look()

    def is_over(self) -> bool:
        """Whether columns have to go after an optimiser's step.

        They have if somebody holds the weight, or if nobody has used them since the last step.
        """
        return self.is_written and (
            self.is_stale or sys.getrefcount(self.weight) > _NUM_OWN_REFERENCES
        )

    def merging(self) -> None:
        """Make way for a merge: from here on, W belongs to it."""
        with LOCK:
            self.look()
            self.epoch += 1
            if not self.is_merged:
                self.version_before_merge = self._version()
            self.is_merged = True

    def unmerged(self) -> None:
        """Note that the pretrained columns are back."""
        if self.is_merged:
            with LOCK:
                self.num_own_versions += self._version() - self.version_before_merge
                self.epoch += 1
                self.is_merged = False

    def _version(self) -> int:
        return 0 if self.weight is None else self.weight._version

    def base(self) -> tuple[int, int]:
        """Tell one pretrained weight from another: what is there, and where."""
        if self.is_sharded:  # and gathered anew, from shards that nobody here can watch
            return 0, 1
        address = 0 if self.weight is None else self._address_of(self.weight)
        return self._version() - self.num_own_versions, address

    def close(self) -> None:
        """Leave the pretrained weight to the module, for good."""
        with LOCK:
            self.restore()
            self.is_closed = True
            weight: Any = dict.get(self.parameters or {}, "weight")
            if type(weight) is WeightParameter:  # of a copied model, perhaps never written
                weight.residency = None
                weight.__class__ = nn.Parameter  # type: ignore[assignment]

    def __del__(self) -> None:
        if self.is_written and not self.is_lost and sys is not None and not sys.is_finalizing():
            # Garbage is collected at any time: perhaps while a compiler runs on fake tensors.
            with torch.utils._python_dispatch._disable_current_modes():
                self.restore()


class _Group:
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

    def waiting(self, first: Residency) -> list[tuple[Residency, _Parts]]:
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
            _restore_all(list(self._members()))
        self.is_looked_at = True


def _put_updates(moves: list[_Move]) -> None:
    """Write columns into all weights, which are known to allow it."""
    epochs = []
    if len(moves) > 1 and all(can_exchange(m.kept.memory, m.update.delta) for m in moves):
        epochs = [move.residency._begin(move.kept) for move in moves]
        exchange([_exchange_of(move.kept, move.update) for move in moves])
    else:
        values = [
            adapted_columns(m.kept.originals, m.update.delta.detach(), m.update.scaling)
            for m in moves
        ]
        for move, value in zip(moves, values, strict=True):
            epochs.append(move.residency._begin(move.kept))
            kept = move.kept
            _put_columns_(kept.memory, kept.columns, value, kept.positions)
    for move, epoch in zip(moves, epochs, strict=True):
        move.residency._end(move, epoch)


def _restore_all(residencies: list[Residency]) -> None:
    """Restore every weight that columns are in, in one launch where that can be."""
    found = [(r, r.present) for r in residencies if r.present is not None and r.is_unchanged()]
    if len(found) < 2 or not all(can_exchange(k.memory, k.originals) for _, k in found):
        for residency, _ in found:
            residency.restore()
        return
    for residency, _ in found:
        residency.epoch += 1
        residency.is_stale = True
    exchange([_exchange_of(kept) for _, kept in found])
    for residency, _ in found:
        residency.present, residency.is_stale = None, False


def _exchange_of(kept: _Kept, update: _Update | None = None) -> Exchange:
    delta = None if update is None else alias_of(update.delta)
    scaling = 0.0 if update is None else update.scaling
    return Exchange(kept.memory, kept.columns, kept.originals, delta, scaling)


class Pass:
    """One forward pass of a layer that may train, and how its backward finds the weight again.

    Args:
        residency: The residency of the layer's weight.
        delta: (O, R) update that the pass is of.
        indices: (R,) int64.
        scaling: Factor between `delta` and the columns.
        is_small: Whether adding two thin products costs less than writing; None where it never
            does. The columns are then written if a larger pass of the same step has asked for them,
            and not if somebody else has left them there: nobody's looks may change a bit.
        writes: Whether this pass trains at all.
    """

    __slots__ = ("base", "is_small", "residency", "update", "version", "writes")

    def __init__(
        self,
        residency: Residency,
        delta: Tensor,
        indices: Tensor,
        scaling: float,
        is_small: bool | None = None,
        writes: bool = True,
    ) -> None:
        self.residency, self.is_small, self.writes = residency, is_small, writes
        self.update = delta, indices, scaling
        self.version, self.base = delta._version, (0, 0)

    def forward(self, compute: Callable[[Tensor, bool], Result]) -> Result | None:
        """Compute with the weight, as `Residency.read` does."""
        self.residency.trainer = threading.get_ident()
        result = self._read(compute)
        self.base = self.residency.base()
        return result

    def backward(self, compute: Callable[[Tensor, bool], Result]) -> Result:
        """Compute with the weight in the state that the forward pass saw.

        Args:
            compute: As `Residency.read` takes it. Where the columns are not in the weight it uses
                the delta that the forward pass has saved, whatever became of it since.

        Raises:
            RuntimeError: If the adapter is merged or the base weight was changed since.
        """
        residency, delta = self.residency, self.update[0]
        if residency.is_merged:
            raise RuntimeError(
                "Backward through a forward pass made before the adapter was merged: the weight "
                "has changed since. Call `unmerge_adapter()` first, or run the forward pass again."
            )
        if residency.find_weight() is None or residency.base() != self.base:
            raise RuntimeError(
                "Backward through a forward pass whose base weight was changed, moved, replaced or "
                "made to ask for a gradient since. Run the forward pass again."
            )
        if delta._version != self.version:  # saved-tensor hooks have kept what it was
            return residency.read_pretrained(compute)
        result = self._read(compute)
        assert result is not None
        return result

    def _read(self, compute: Callable[[Tensor, bool], Result]) -> Result | None:
        delta = self.update[0]
        self.residency.is_alone = self.is_small is not None
        writes = self.writes and delta.requires_grad
        if self.is_small is not None and writes:
            if self.is_small:
                writes = self.residency.is_claimed(delta)
            else:
                self.residency.claim(delta)
        return self.residency.read(compute, *self.update, writes=writes)


@contextmanager
def resident(model: nn.Module) -> Iterator[None]:
    """Let this thread keep the adapted columns in the weights while it evaluates.

    Without it, evaluation never writes: it adds a thin product to each layer's output, and any
    number of threads may share the model. Inside it, this thread's forward passes write the columns
    once and then multiply once, which is faster for generation. Other threads get right results all
    the same; one that is inside it at the same time evaluates as it would without. Parameter
    objects that somebody held before show the adapted columns until it ends.

    Args:
        model: With PaCA layers anywhere in it; other layers are left alone.
    """
    thread = threading.get_ident()
    found = [getattr(module, "residency", None) for module in model.modules()]
    owned: list[Residency] = []
    try:
        with LOCK:
            for residency in found:
                if isinstance(residency, Residency) and residency.owner is None:
                    owned.append(residency)
                    residency.owner = thread
        yield
    finally:
        for residency in owned:
            residency.owner = None
            residency.restore()


_PLAIN = (nn.Parameter, WeightParameter)


def _is_ordinary(weight: Tensor) -> bool:
    return not weight.is_meta and not weight.is_inference() and owns_its_memory(weight)


# To a weight: the guarded dictionary's, Residency.weight, and getrefcount's argument.
_NUM_OWN_REFERENCES = 3


def _is_numpys(memory: Tensor) -> bool:
    """Whether numpy can change it, which no version counter notices."""
    return memory.is_cpu


def _is_on_gpu(weight: Tensor) -> bool:
    return weight.is_cuda


def _is_capturing() -> bool:
    """Whether a CUDA graph is being recorded."""
    return torch.cuda.is_current_stream_capturing()


def _put_columns_(
    memory: Tensor, columns: Tensor, values: Tensor, positions: Tensor | None
) -> None:
    """Write memory[:, columns] = values by the fastest kernel for the device."""
    if _is_flat(memory):
        # Row by row; index_copy_ goes column by column and misses the cache each time.
        if positions is None:
            positions = _flat_positions(memory, columns)
        memory.view(-1).put_(positions, values)
    else:
        memory.index_copy_(1, columns, values)


# Eight bytes each: 256 KiB per layer at most, for layers so small that finding them takes time.
_MAX_KEPT_POSITIONS = 2**15


def _is_flat(memory: Tensor) -> bool:
    return memory.device.type == "cpu" and memory.is_contiguous()


def _flat_positions(memory: Tensor, columns: Tensor) -> Tensor:
    """Return the (O, R) positions of the columns in the flat memory of a contiguous (O, I)."""
    return _row_starts(*memory.shape) + columns


@functools.lru_cache(maxsize=64)
def _row_starts(out_features: int, in_features: int) -> Tensor:
    return torch.arange(0, out_features * in_features, in_features, device="cpu").unsqueeze(1)


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
        _restore_all(over)
        for residency in over:
            residency.restore()  # or tell of what was changed meanwhile
        for residency in found:
            residency.is_stale = residency.is_written
    if found and (found[0].group is None or not found[0].group.consists_of(found)):
        group = _Group(found)
        for residency in found:
            residency.group = group


register_optimizer_step_pre_hook(_before_optimizer_step)
register_optimizer_step_post_hook(_after_optimizer_step)
