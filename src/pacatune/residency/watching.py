"""Notices who looks at a frozen weight and who changes a trained delta behind autograd's back."""

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import proxy_tensor
from torch.optim import optimizer as torch_optimizer

LOCK = threading.RLock()
"""Held by whoever changes a weight's columns or hands a weight out, for microseconds.

One for all weights. A signal handler may look at the model while its thread writes: reentrant."""

if hasattr(os, "register_at_fork"):  # so that no child starts with a weight half written
    os.register_at_fork(
        before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release
    )


class _Watched(nn.Parameter):
    """A parameter that notices the use of `.data`, whose edits change no version counter."""

    residency: "weakref.ref[Any] | None" = None
    """Whose it is; a copy is nobody's."""

    @property
    def data(self) -> Tensor:
        """An alias whose edits do not change this parameter's version."""
        with LOCK:
            self._expose()
            return alias_of(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        with LOCK:
            self._expose()
            torch._C.TensorBase.data.__set__(self, value)  # type: ignore[attr-defined]

    def _expose(self) -> None:
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        hooks: dict[int, Any] = {}
        return torch._utils._rebuild_parameter, (self.data, self.requires_grad, hooks)


class DeltaParameter(_Watched):
    """A trained update that counts the edits which its version counter misses."""

    num_steps = 0
    """How many optimiser steps have changed it."""
    num_unversioned = 0
    """Grows with each of these and each use of `.data`, of which versions may not tell."""
    is_exposed = False
    """Whether somebody took `.data` and may still hold it."""
    is_gathered = False
    """Whether it is a temporary of FSDP2, in the memory of a buffer that FSDP2 keeps."""

    def _expose(self) -> None:
        self.is_exposed = True
        self.num_unversioned += 1


class WeightParameter(_Watched):
    """A frozen weight that adapted columns are written into; to take its `.data` is to look."""

    def _expose(self) -> None:
        residency = None if self.residency is None else self.residency()
        if residency is not None:
            residency.look(at_data=True)


# Both go by exact types: optimisers on their fast (foreach and fused) paths, and make_fx.
torch_optimizer._foreach_supported_types += [DeltaParameter, WeightParameter]
proxy_tensor.HANDLED_TYPES += (DeltaParameter, WeightParameter)  # type: ignore[assignment]


def _after_a_look(method: Callable[..., Any]) -> Any:
    def call(self: "GuardedParameters", *args: Any) -> Any:
        with LOCK:
            self._look()
            return method(self, *args)

    return call


class GuardedParameters(dict[str, Any]):
    """A module's parameters; puts the pretrained columns back before anybody sees them.

    Looking and handing out are one step, under the lock: a thread that trains must not write in
    between. Views are of a plain copy, which keeps hold of the weight until they are gone.
    """

    residency: "weakref.ref[Any]"

    def _look(self) -> None:
        residency = self.residency()
        if residency is not None:
            residency.look()

    def _is_pretrained_in_graph(self) -> bool:
        """Whether a graph is being compiled, which cannot look, and need not."""
        if not torch.compiler.is_compiling():
            return False
        residency = self.residency()
        return residency is None or not residency.is_written

    def __getitem__(self, name: str) -> Any:
        if name != "weight" or self._is_pretrained_in_graph():
            return super().__getitem__(name)
        with LOCK:
            self._look()
            return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As dict's."""
        if name != "weight":
            return super().get(name, default)
        with LOCK:
            self._look()
            return super().get(name, default)

    def items(self) -> Any:
        """As dict's."""
        return self.copy().items()

    def values(self) -> Any:
        """As dict's."""
        return self.copy().values()

    def __iter__(self) -> Any:
        # Python copies a dict as memory (`dict(d)`, `{**d}`, `d | {}`) unless it iterates in its
        # own way: then key by key, through `__getitem__`.
        return super().__iter__()

    def copy(self) -> dict[str, Any]:
        """Return a plain dict."""
        with LOCK:
            self._look()
            return dict(super().items())

    def __setitem__(self, name: str, value: Any) -> None:
        with LOCK:
            residency = self.residency()
            if residency is not None:
                residency.replace(value) if name == "weight" else residency.look()
            super().__setitem__(name, value)

    pop = _after_a_look(dict.pop)
    popitem = _after_a_look(dict.popitem)
    setdefault = _after_a_look(dict.setdefault)
    __delitem__ = _after_a_look(dict.__delitem__)
    __repr__ = _after_a_look(dict.__repr__)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (self.copy(),)


def guard(module: nn.Module, link: "weakref.ref[Any]") -> GuardedParameters | None:
    """Put a guarded dictionary in place of the module's own; None if that is no plain one."""
    release(module)
    parameters = module.__dict__["_parameters"]
    if type(parameters) is not dict:
        return None
    guarded = GuardedParameters(parameters)
    guarded.residency = link
    module.__dict__["_parameters"] = guarded
    return guarded


def release(module: nn.Module) -> None:
    """Give `module` a plain parameter dictionary again, with the pretrained weight in it."""
    parameters = module.__dict__["_parameters"]
    if isinstance(parameters, GuardedParameters):
        module.__dict__["_parameters"] = parameters.copy()


def alias_of(tensor: Tensor) -> Tensor:
    """Return `tensor.data`, unnoticed."""
    return torch._C.TensorBase.data.__get__(tensor)  # type: ignore[attr-defined]


def owns_its_memory(tensor: Tensor) -> bool:
    """False for views into a larger buffer (FSDP1's flat parameter, DeepSpeed's flat groups)."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def num_tensors_on(tensor: Tensor) -> int:
    """How many tensors share this tensor's memory, itself included."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1  # `storage` counts as well


def is_tracked(delta: Tensor, *, is_gathered: bool = False) -> bool:
    """Whether every later change of `delta` will be noticed; makes it a DeltaParameter.

    With `is_gathered` it belongs to a weight that FSDP2 has gathered. It has then been gathered
    with it, unless it has been watched from the start; the optimiser changes its shards.
    """
    if type(delta) is nn.Parameter and not delta.is_inference():
        delta.__class__ = DeltaParameter
        delta.is_exposed, delta.is_gathered = not is_gathered, is_gathered  # type: ignore[attr-defined]
    if type(delta) is not DeltaParameter:
        return False
    if delta.is_gathered:
        return is_gathered
    if delta.is_exposed and owns_its_memory(delta) and num_tensors_on(delta) == 1:
        delta.is_exposed = False
    return not delta.is_exposed
