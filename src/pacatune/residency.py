"""Keeps adapted columns inside a frozen weight; whoever looks sees the pretrained ones.

PaCA is fast because the adapted columns sit in W itself: one GEMM, nothing beside it. The price is
that W is not the pretrained weight while they do. This module pays it, and no other module writes
to a base weight during training.

    write     W[:, indices] <- originals + scaling * delta    before W is read, if delta changed
    restore   W[:, indices] <- originals                      before anybody else reads W

Who may see W, and how each is served:
  * Our own forward and backward call `write`; a few comparisons say that nothing changed, so it
    writes once per optimiser step and never per micro-batch. There are no call counters: the state
    depends on values, not on how often it was asked.
  * Everybody who reaches W through its module (attribute, parameters(), state_dict, deepcopy,
    pickle, .to(), FSDP) goes through the module's parameter dictionary, which restores before it
    answers (`observing.GuardedParameters`).
  * Whoever already holds the Parameter object (an optimiser over all parameters, DDP) sees the
    pretrained weight again after every optimiser step, through torch's step hook. If nobody holds
    it, that write is saved.
  * While somebody holds another tensor over the same memory (the values of a state_dict, say),
    `write` refuses, and the layer uses the additive form, which never touches W.

How a change of delta is noticed: its version counter (in-place arithmetic, load_state_dict), the
step hook (fused optimisers do not count versions), its identity and scaling (another adapter), and
`observing.DeltaParameter`, which notices that somebody took `.data`, because edits through that
alias leave no other trace.

Writes go through an alias of W with a version counter of its own, so autograd's saved-tensor check
never trips on them; the backward pass calls `write` again before it reads W. Deltas, not columns,
are what is trained: an untrained delta writes nothing but the original bits.
"""

import functools
import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pacatune.observing import (
    DeltaParameter,
    Watcher,
    guard,
    is_tracked,
    num_tensors_on,
    owns_its_memory,
)

__all__ = ["Residency"]


class Residency:
    """The adapted columns of one module's weight: at most one adapter's, written on demand.

    Args:
        module: Holds the frozen (O, I) weight in its parameter dictionary.
    """

    def __init__(self, module: nn.Module) -> None:
        # Another module sees the weight as well (tied embeddings): never write.
        self.is_shared = False
        # What stands in the module during a forward pass is a temporary copy (FSDP2): read only.
        self.is_sharded = False
        self.is_merged = False
        self.is_written = False
        # Written, but an optimiser step has passed since.
        self.is_stale = False
        self.link: weakref.ref[Watcher] = weakref.ref(self)
        self.parameters = guard(module, self.link)
        self._forget()

    def _forget(self) -> None:
        self.weight: Tensor | None = None
        self.weight_version = self.delta_version = -1
        # An alias of the weight: writes through it pass autograd's version check.
        self.memory: Tensor | None = None
        # (O, R) in the weight's dtype, and the (R,) columns they belong to: a copy, since the
        # adapter's own may be reloaded.
        self.originals: Tensor | None = None
        self.columns: Tensor | None = None
        self.positions: Tensor | None = None  # theirs in the flat memory, where worth keeping
        self.delta: Tensor | None = None
        self.indices: Tensor | None = None
        self.scaling = 0.0

    def holds(self, delta: Tensor, indices: Tensor, scaling: float) -> bool:
        """Whether W holds W[:, indices] + scaling * delta for the current values of delta."""
        return (
            self.is_written
            and not self.is_stale
            and delta is self.delta
            and delta._version == self.delta_version
            and not delta.is_exposed  # type: ignore[attr-defined]
            and indices is self.indices
            and scaling == self.scaling
            and self.weight._version == self.weight_version  # type: ignore[union-attr]
        )

    def holds_or_restore(self, delta: Tensor, indices: Tensor, scaling: float) -> bool:
        """Return True if W holds the adapted columns; else leave the pretrained ones there."""
        if self.holds(delta, indices, scaling):
            return True
        self._refuse_if_merged()
        self.restore()
        return False

    def write(self, delta: Tensor, indices: Tensor, scaling: float) -> bool:
        """Make sure that W holds W[:, indices] + scaling * delta; costs next to nothing if it does.

        Args:
            delta: (O, R) update, an nn.Parameter.
            indices: (R,) int64, fixed from here on: in-place edits are not noticed.
            scaling: Factor between `delta` and the columns.

        Returns:
            False if W must not be written now; it then holds the pretrained columns.

        Raises:
            RuntimeError: If somebody changed the weight or merged into it since the forward pass.
        """
        return self.holds(delta, indices, scaling) or self._write(delta, indices, scaling)

    def _write(self, delta: Tensor, indices: Tensor, scaling: float) -> bool:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self._write(delta, indices, scaling)
        self._refuse_if_merged()
        if not self._may_write(delta):
            self.restore()
            return False
        if indices is not self.indices or self.originals is None:
            self.restore()
            self._read_originals(indices)
        assert self.memory is not None
        assert self.columns is not None
        assert self.originals is not None
        update = delta.detach()
        adapted = torch.add(self.originals, update, alpha=scaling).to(self.memory.dtype)
        self.is_written = self.is_stale = True  # should we be interrupted here: `restore` knows
        _put_columns_(self.memory, self.columns, adapted, self.positions)
        self.is_stale = False
        self.delta, self.delta_version, self.scaling = delta, delta._version, scaling
        delta.residency, delta.is_exposed = self.link, False  # type: ignore[attr-defined]
        return True

    def _refuse_if_merged(self) -> None:
        if self.is_merged:
            raise RuntimeError(
                "Backward through a forward pass made before the adapter was merged: the weight "
                "has changed since. Call `unmerge_adapter()` first, or run the forward pass again."
            )

    def _read_originals(self, indices: Tensor) -> None:
        assert self.weight is not None
        self.memory = self.weight.data
        self.weight_version = self.weight._version
        self.indices, self.columns = indices, indices.clone()
        self.originals = self.memory.index_select(1, indices)
        self.positions = None
        if _is_flat(self.memory) and self.originals.numel() <= _MAX_KEPT_POSITIONS:
            self.positions = _flat_positions(self.memory, self.columns)

    def find_weight(self) -> Tensor | None:
        """Return the module's weight if it is a plain frozen one; writing it may be forbidden."""
        if self.parameters is None:
            return None
        weight = dict.get(self.parameters, "weight")
        if weight is not self.weight:
            self.restore()
            self._forget()
            if type(weight) is nn.Parameter and _is_ordinary(weight):
                self.weight = weight
        return None if self.weight is None or self.weight.requires_grad else self.weight

    def _may_write(self, delta: Tensor) -> bool:
        """Whether W is ours alone to write, and every change of `delta` will be noticed."""
        weight = self.find_weight()
        if weight is None or self.is_shared or self.is_sharded or delta.device != weight.device:
            return False
        if weight._version != self.weight_version and self.originals is not None:
            if self.is_written:
                raise RuntimeError(
                    "The base weight was changed in place while its adapted columns were in it. "
                    "Reach it through its module (`layer.base_layer.weight`), which puts the "
                    "pretrained columns back first."
                )
            self._drop_originals()
        if num_tensors_on(weight) > (1 if self.memory is None else 2):
            return False
        return is_tracked(delta)

    def _drop_originals(self) -> None:
        self.originals = self.memory = None

    def restore(self) -> None:
        """Put the pretrained columns back, bit for bit, if they are not there."""
        if self.is_written:
            assert self.originals is not None
            assert self.memory is not None
            assert self.columns is not None
            _put_columns_(self.memory, self.columns, self.originals, self.positions)
            self.is_written = self.is_stale = False

    def pretrained_weight(self) -> Tensor:
        """Return the (O, I) pretrained weight as a copy, for traced graphs: they must not write."""
        assert self.weight is not None
        assert self.columns is not None
        assert self.originals is not None
        return self.weight.index_copy(1, self.columns, self.originals)

    def look(self) -> None:
        """Restore for somebody who may change what he sees: the originals are read anew after."""
        self.restore()
        self._drop_originals()

    def after_step(self) -> None:
        """Note that an optimiser changed delta.

        Restores at once if somebody holds the weight, or if nobody has written since the last step:
        then compiled graphs run, which work around columns that are there at the cost of a copy.
        """
        if self.is_stale or sys.getrefcount(self.weight) > _NUM_OWN_REFERENCES:
            self.restore()
        self.is_stale = self.is_written

    def __del__(self) -> None:
        if self.is_written and sys is not None and not sys.is_finalizing():
            self.restore()


def _is_ordinary(weight: Tensor) -> bool:
    return not weight.is_meta and not weight.is_inference() and owns_its_memory(weight)


# To a weight: the guarded dictionary's, Residency.weight, and getrefcount's argument.
_NUM_OWN_REFERENCES = 3


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


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if type(parameter) is DeltaParameter and parameter.residency is not None:
                residency = parameter.residency()
                if residency is not None:
                    residency.after_step()


register_optimizer_step_post_hook(_after_optimizer_step)
