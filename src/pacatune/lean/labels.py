"""Labels that the host can read at a loss without waiting for the model on its GPU.

Which rows of a batch count decides how many logits are computed, and only the host can ask for
them. Labels come before the layers, so a copy of them is on its way to the host while the layers
are queued, and what the model does to them until its loss (a shift, a flat view) is done to the
copy when it is read. Whatever else is done to them gives a plain tensor, whose reader waits.
"""

from collections.abc import Callable
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_MOVES: frozenset[Callable[..., Any]] = frozenset(
    (F.pad, Tensor.__getitem__, Tensor.contiguous, Tensor.view, Tensor.reshape, Tensor.flatten)
)


class Labels(Tensor):
    """Labels with a copy on the host, as `with_copy` makes them; a tensor to everybody else."""

    copy: Tensor
    """The first labels on the host; it may be on its way."""
    arrived: Any
    """Event after which it is there; None at once."""
    moves: tuple[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]], ...]
    """What these are made of the first ones by."""
    versions: tuple[tuple[Tensor, int], ...]
    """All on the way to these, as they were by then."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not all(issubclass(kind, Tensor) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
            if function in (*_MOVES, Tensor.to) and isinstance(args[0], Labels):
                return _moved(args[0], result, function, args[1:], kwargs)
        return result

    def on_host(self) -> Tensor | None:
        """Return them on the host; None if somebody has changed them in place."""
        with torch._C.DisableTorchFunctionSubclass():
            if any(labels._version != version for labels, version in self.versions):
                return None
            if self.arrived is not None:
                self.arrived.synchronize()
            labels = self.copy
            for function, args, kwargs in self.moves:
                labels = function(labels, *args, **kwargs)
            return labels


def is_away(labels: Tensor) -> bool:
    """Whether the host would wait for what it reads of them."""
    return labels.is_cuda


def with_copy(labels: Tensor) -> Labels:
    """Return labels in the same memory, of which the host gets a copy from now on."""
    copy = torch.empty_like(labels, device="cpu", pin_memory=labels.is_cuda)
    copy.copy_(labels, non_blocking=True)
    arrived = None
    if labels.is_cuda:
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(labels.device))
    return _new(labels, copy, arrived, (), ())


def _moved(labels: Labels, result: Tensor, function: Any, args: Any, kwargs: Any) -> Tensor:
    moves = labels.moves
    if function is not Tensor.to:
        moves = (*moves, (function, args, kwargs))
    if result.dtype != labels.dtype or not (function is Tensor.to or _is_plain(args)):
        return result
    return _new(result, labels.copy, labels.arrived, moves, labels.versions)


def _new(labels: Tensor, copy: Tensor, arrived: Any, moves: Any, versions: Any) -> Labels:
    new: Any = labels.as_subclass(Labels)
    new.copy, new.arrived, new.moves = copy, arrived, moves
    new.versions = (*versions, (labels, labels._version))
    return new


def _is_plain(values: Any) -> bool:
    """Whether arguments are numbers and slices, which mean the same on the host."""
    if isinstance(values, tuple | list):
        return all(map(_is_plain, values))
    return values is None or isinstance(values, int | slice | EllipsisType)
