"""Notices who looks at a frozen weight and who changes a trained delta behind autograd's back."""

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = [
    "DeltaParameter",
    "GuardedParameters",
    "guard",
    "is_tracked",
    "num_tensors_on",
    "owns_its_memory",
    "release",
]


class Watcher(Protocol):
    """What is told: a Residency."""

    is_sharded: bool
    """Set when a weight is put in place that is no plain parameter: then no weight is written."""

    def after_step(self) -> None:
        """An optimiser has changed the delta."""

    def look(self) -> None:
        """Somebody is about to see the weight, and may change it."""


class DeltaParameter(nn.Parameter):
    """A trained update that remembers if somebody took `.data`, the untracked way to edit it."""

    residency: "weakref.ref[Watcher] | None" = None  # whoever wrote it last
    is_exposed = False

    @property
    def data(self) -> Tensor:
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


class GuardedParameters(dict[str, Any]):
    """A module's parameters; puts the pretrained columns back before anybody sees them."""

    residency: "weakref.ref[Watcher]"

    def _look(self) -> None:
        residency = self.residency()
        if residency is not None:
            residency.look()

    def __getitem__(self, name: str) -> Any:
        if name == "weight":
            self._look()
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As dict's."""
        if name == "weight":
            self._look()
        return super().get(name, default)

    def items(self) -> Any:
        """As dict's."""
        self._look()
        return super().items()

    def values(self) -> Any:
        """As dict's."""
        self._look()
        return super().values()

    def pop(self, *args: Any) -> Any:
        """As dict's."""
        self._look()
        return super().pop(*args)

    def copy(self) -> dict[str, Any]:
        """Return a plain dict."""
        self._look()
        return dict(self)

    def __setitem__(self, name: str, value: Any) -> None:
        self._look()
        super().__setitem__(name, value)
        residency = self.residency()
        if name == "weight" and type(value) is not nn.Parameter and residency is not None:
            # A sharded weight (FSDP2's DTensor) or another subclass: what later stands here is a
            # temporary copy of it.
            residency.is_sharded = True

    def __delitem__(self, name: str) -> None:
        self._look()
        super().__delitem__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (self.copy(),)


def guard(module: nn.Module, link: "weakref.ref[Watcher]") -> GuardedParameters | None:
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


def owns_its_memory(tensor: Tensor) -> bool:
    """False for views into a larger buffer (FSDP1's flat parameter, DeepSpeed's flat groups)."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def num_tensors_on(tensor: Tensor) -> int:
    """How many tensors share this tensor's memory, itself included."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1  # `storage` counts as well


def is_tracked(delta: Tensor) -> bool:
    """Whether every later change of `delta` will be noticed; makes it a DeltaParameter."""
    if type(delta) is nn.Parameter and not delta.is_inference():
        delta.__class__ = DeltaParameter
        delta.is_exposed = True  # type: ignore[attr-defined]
    if type(delta) is not DeltaParameter:
        return False
    if delta.is_exposed:
        return owns_its_memory(delta) and num_tensors_on(delta) == 1
    return True
