"""Keeps adapted columns inside a frozen weight, and gives the pretrained ones back to whoever looks.

PaCA is fast because the adapted columns sit in W itself: one GEMM, nothing beside it. The price is that W is not the
pretrained weight while they do. This module pays it, and no other module writes to a base weight during training.

    write     W[:, indices] <- originals + scaling * delta     before W is read, if delta has changed since
    restore   W[:, indices] <- originals                       before anybody else reads W

Who may see W, and how each is served:
  * Our own forward and backward call `write`; a few comparisons say that nothing changed, so it writes once per optimiser
    step and never per micro-batch. There are no call counters: the state depends on values, not on how often it was asked.
  * Everybody who reaches W through its module (attribute, parameters(), state_dict, deepcopy, pickle, .to(), FSDP) goes
    through the module's parameter dictionary. `_GuardedParameters` takes its place and restores before it answers.
  * Whoever already holds the Parameter object (an optimiser over all parameters, DDP) sees the pretrained weight again after
    every optimiser step, through torch's step hook. If nobody holds it, that write is saved.
  * While somebody holds another tensor over the same memory (the values of a state_dict, say), `write` refuses, and the
    layer uses the additive form, which never touches W.

How a change of delta is noticed: its version counter (in-place arithmetic, load_state_dict), the step hook (fused optimisers do
not count versions), its identity and scaling (another adapter), and `DeltaParameter`, which notices that somebody took
`.data`, because edits through that alias leave no other trace.

Writes go through an alias of W with a version counter of its own, so autograd's saved-tensor check never trips on them; the
backward pass calls `write` again before it reads W. Deltas, not columns, are what is trained: untrained deltas write
nothing but the original bits.
"""

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["DeltaParameter", "Residency", "release"]


class DeltaParameter(nn.Parameter):
    """A trained update that remembers whether somebody took `.data`, the one untracked way to edit it."""

    residency: "weakref.ref[Residency] | None" = None  # whoever wrote it last
    is_exposed = False

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """An alias whose edits do not change this parameter's version."""
        self.is_exposed = True
        return torch._C.TensorBase.data.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @data.setter
    def data(self, value: Tensor) -> None:
        self.is_exposed = True
        torch._C.TensorBase.data.__set__(self, value)  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The link to the residency belongs to this process and this module.
        hooks: dict[int, Any] = {}
        return torch._utils._rebuild_parameter, (self.data, self.requires_grad, hooks)


class _GuardedParameters(dict[str, Any]):
    """A module's parameter dictionary that puts the pretrained columns back before anybody sees them."""

    residency: "weakref.ref[Residency]"

    def _look(self) -> None:
        residency = self.residency()
        if residency is not None:
            residency.look()

    def __getitem__(self, name: str) -> Any:
        self._look()
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._look()
        return super().get(name, default)

    def items(self) -> Any:
        self._look()
        return super().items()

    def values(self) -> Any:
        self._look()
        return super().values()

    def pop(self, *args: Any) -> Any:
        self._look()
        return super().pop(*args)

    def copy(self) -> dict[str, Any]:
        self._look()
        return dict(self)

    def __setitem__(self, name: str, value: Any) -> None:
        self._look()
        super().__setitem__(name, value)
        residency = self.residency()
        if name == "weight" and type(value) is not nn.Parameter and residency is not None:
            # A sharded weight (FSDP2's DTensor) or another subclass: what later stands here is a temporary copy of it.
            residency.is_blocked = True

    def __delitem__(self, name: str) -> None:
        self._look()
        super().__delitem__(name)

    def __reduce__(self) -> Any:
        self._look()
        return dict, (dict(self),)

    __reduce_ex__ = lambda self, protocol: self.__reduce__()  # noqa: E731


class Residency:
    """The adapted columns of one module's weight: at most one adapter's, written on demand.

    Args:
        module: Holds the frozen (O, I) weight in its parameter dictionary.
    """

    def __init__(self, module: nn.Module) -> None:
        self.is_blocked = False  # never write: another module sees the weight (tied), or it is sharded
        self.is_merged = False
        self.is_written = False
        self.is_stale = False  # written, but an optimiser step has passed since
        self.link = weakref.ref(self)
        self.parameters = _guard(module, self.link)
        self._forget()

    def _forget(self) -> None:
        self.weight: Tensor | None = None
        self.weight_version = self.delta_version = -1
        self.memory: Tensor | None = None  # alias of the weight; writes through it pass autograd's version check
        self.originals: Tensor | None = None  # (O, R) in the weight's dtype
        self.columns: Tensor | None = None  # (R,) where they belong; a copy, the adapter's own may be reloaded
        self.delta: Tensor | None = None
        self.indices: Tensor | None = None
        self.scaling = 0.0

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
        if (
            self.is_written
            and not self.is_stale
            and delta is self.delta
            and delta._version == self.delta_version
            and not delta.is_exposed  # type: ignore[attr-defined]
            and indices is self.indices
            and scaling == self.scaling
            and self.weight._version == self.weight_version  # type: ignore[union-attr]
        ):
            return True
        return self._write(delta, indices, scaling)

    @torch.no_grad()
    def _write(self, delta: Tensor, indices: Tensor, scaling: float) -> bool:
        if self.is_merged:
            raise RuntimeError(
                "Backward through a forward pass made before the adapter was merged: the weight has "
                "changed since. Call `unmerge_adapter()` first, or run the forward pass again."
            )
        if not self._may_write(delta):
            self.restore()
            return False
        if indices is not self.indices or self.originals is None:
            self.restore()
            self._read_originals(indices)
        assert self.memory is not None
        assert self.columns is not None
        assert self.originals is not None
        adapted = torch.add(self.originals, delta, alpha=scaling).to(self.memory.dtype)
        _put_columns_(self.memory, self.columns, adapted)
        self.is_written, self.is_stale = True, False
        self.delta, self.delta_version, self.scaling = delta, delta._version, scaling
        delta.residency, delta.is_exposed = self.link, False  # type: ignore[attr-defined]
        return True

    def _read_originals(self, indices: Tensor) -> None:
        assert self.weight is not None
        self.memory = self.weight.data
        self.weight_version = self.weight._version
        self.indices, self.columns = indices, indices.clone()
        self.originals = self.memory.index_select(1, indices)

    def _may_write(self, delta: Tensor) -> bool:
        """Whether W is ours alone to write, and every change of `delta` will be noticed."""
        if self.is_blocked or self.parameters is None:
            return False
        weight = dict.get(self.parameters, "weight")
        if weight is not self.weight:
            self.restore()
            self._forget()
            if type(weight) is not nn.Parameter or weight.is_meta or not _owns_its_memory(weight):
                return False
            self.weight = weight
        assert weight is not None
        if weight.requires_grad or delta.device != weight.device:
            return False
        if weight._version != self.weight_version and self.originals is not None:
            if self.is_written:
                raise RuntimeError(
                    "The base weight was changed in place while its adapted columns were in it. Reach it "
                    "through its module (`layer.base_layer.weight`), which puts the pretrained "
                    "columns back first."
                )
            self._drop_originals()
        if _num_tensors_on(weight) > (1 if self.memory is None else 2):
            return False
        return _is_tracked(delta)

    def _drop_originals(self) -> None:
        self.originals = self.memory = None

    def restore(self) -> None:
        """Put the pretrained columns back, bit for bit, if they are not there."""
        if self.is_written:
            assert self.memory is not None
            assert self.columns is not None
            assert self.originals is not None
            with torch.no_grad():
                _put_columns_(self.memory, self.columns, self.originals)
            self.is_written = self.is_stale = False

    def pretrained_weight(self) -> Tensor:
        """Return the (O, I) pretrained weight as a copy, for graphs that must not write; traceable."""
        assert self.weight is not None
        assert self.columns is not None
        assert self.originals is not None
        return self.weight.index_copy(1, self.columns, self.originals)

    def look(self) -> None:
        """Restore for somebody who may change what he sees: the originals are read anew after."""
        self.restore()
        self._drop_originals()

    def after_step(self) -> None:
        """Note that an optimiser changed delta; restore at once if somebody holds the weight."""
        self.is_stale = True
        if sys.getrefcount(self.weight) > _NUM_OWN_REFERENCES:
            self.restore()

    def __del__(self) -> None:
        if self.is_written and not sys.is_finalizing():
            self.restore()


_NUM_OWN_REFERENCES = 3  # to a weight: the guarded dictionary's, Residency.weight, getrefcount's argument


def _guard(module: nn.Module, link: "weakref.ref[Residency]") -> _GuardedParameters | None:
    """Put a guarded dictionary in place of the module's own; None if it is no plain one (ZeRO-3)."""
    release(module)
    parameters = module.__dict__["_parameters"]
    if type(parameters) is not dict:
        return None
    guarded = _GuardedParameters(parameters)
    guarded.residency = link
    module.__dict__["_parameters"] = guarded
    return guarded


def release(module: nn.Module) -> None:
    """Give `module` a plain parameter dictionary again, with the pretrained weight in it."""
    parameters = module.__dict__["_parameters"]
    if isinstance(parameters, _GuardedParameters):
        module.__dict__["_parameters"] = parameters.copy()


def _owns_its_memory(tensor: Tensor) -> bool:
    """False for views into a larger buffer (FSDP1's flat parameter, DeepSpeed's flat groups)."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _num_tensors_on(tensor: Tensor) -> int:
    """How many tensors share this tensor's memory, itself included."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1  # `storage` counts as well


def _is_tracked(delta: Tensor) -> bool:
    """Whether every later change of `delta` will be noticed; makes it a DeltaParameter."""
    if type(delta) is nn.Parameter:
        delta.__class__ = DeltaParameter
        delta.is_exposed = True  # type: ignore[attr-defined]
    if type(delta) is not DeltaParameter:
        return False
    if delta.is_exposed:
        return _owns_its_memory(delta) and _num_tensors_on(delta) == 1
    return True


def _put_columns_(memory: Tensor, columns: Tensor, values: Tensor) -> None:
    """Write memory[:, columns] = values by the fastest kernel for the dtype and device."""
    if memory.device.type == "cpu" and memory.dtype in (torch.float32, torch.float64):
        memory.scatter_(1, columns.expand(values.shape), values)  # half the time of index_copy_
    else:
        memory.index_copy_(1, columns, values)


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if type(parameter) is DeltaParameter and parameter.residency is not None:
                residency = parameter.residency()
                if residency is not None:
                    residency.after_step()


register_optimizer_step_post_hook(_after_optimizer_step)
