"""Logits that are computed when somebody reads them, and not at all if only their loss is wanted.

A model computes logits, does something to them (a cast, a soft cap, a shift), and hands them to
its loss. In place of the first, the head returns a `LazyLogits`: it remembers the last hidden
states and what is done to the logits, and when torch's cross-entropy is called with it, computes
that in chunks (cross_entropy.py). So every model's own loss, with its own normalisation and masks,
stays in use. Any other use computes the logits as the head would have.
"""

from collections.abc import Callable
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pacatune.lean.cross_entropy import linear_cross_entropy

__all__ = ["LazyLogits"]

Step = Callable[[Tensor], Tensor]


class LazyLogits:
    """Stands for steps(x weight^T + bias).

    Args:
        x: (..., I) hidden states.
        weight: (V, I).
        bias: (V,) or None.
        steps: Elementwise operations on the logits, in their order.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, steps: tuple[Step, ...] = ()
    ) -> None:
        self._x, self._weight, self._bias, self._steps = x, weight, bias, steps
        self._logits: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """(..., V)."""
        return torch.Size((*self._x.shape[:-1], len(self._weight)))

    @property
    def device(self) -> torch.device:
        """Where they would be."""
        return self._x.device

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one of its numbers."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self._x.dim()

    def compute(self) -> Tensor:
        """Return the (..., V) logits."""
        if self._logits is None:
            self._logits = self._transform(F.linear(self._x, self._weight, self._bias))
        return self._logits

    def _transform(self, logits: Tensor) -> Tensor:
        for step in self._steps:
            logits = step(logits)
        return logits

    def _with(self, x: Tensor) -> "LazyLogits":
        return LazyLogits(x, self._weight, self._bias, self._steps)

    def _then(self, step: Step) -> "LazyLogits":
        return LazyLogits(self._x, self._weight, self._bias, (*self._steps, step))

    def float(self) -> "LazyLogits":
        """Cast to float32."""
        return self._then(Tensor.float)

    def contiguous(self) -> "LazyLogits":
        """Change nothing."""
        return self

    def tanh(self) -> "LazyLogits":
        """Apply tanh."""
        return self._then(torch.tanh)

    def __truediv__(self, number: Any) -> Any:
        if isinstance(number, int | float):
            return self._then(lambda logits: logits / number)
        return self.compute() / _computed(number)

    def __mul__(self, number: Any) -> Any:
        if isinstance(number, int | float):
            return self._then(lambda logits: logits * number)
        return self.compute() * _computed(number)

    __rmul__ = __mul__

    def view(self, *shape: Any) -> Any:
        """Flatten the leading dimensions if that is what is asked for."""
        sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        if sizes in ((-1, len(self._weight)), (self._x.shape[:-1].numel(), len(self._weight))):
            return self._with(self._x.reshape(-1, self._x.shape[-1]))
        return self.compute().view(*shape)

    reshape = view

    def __getitem__(self, index: Any) -> Any:
        if _keeps_last(index, self.dim()):
            return self._with(self._x[index])
        return self.compute()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols that no tensor has: copying, arrays
            raise AttributeError(name)
        return getattr(self.compute(), name)

    def __len__(self) -> int:
        return self.shape[0]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.tanh and isinstance(args[0], cls) and len(args) == 1 and not kwargs:
            return args[0].tanh()
        if function is F.cross_entropy:
            loss = _cross_entropy(*args, **kwargs)
            if loss is not None:
                return loss
        args = tuple(_computed(argument) for argument in args)
        return function(*args, **{name: _computed(value) for name, value in kwargs.items()})


def _cross_entropy(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """Compute torch's cross-entropy in chunks; None where it must see all logits."""
    if not isinstance(input, LazyLogits) or isinstance(target, LazyLogits):
        return None
    is_plain = weight is None and size_average is None and reduce is None
    is_plain &= input.dim() == 2 and target.dim() == 1 and target.dtype == torch.int64
    if not is_plain or reduction not in ("mean", "sum") or len(target) != len(input):
        return None
    return linear_cross_entropy(
        input._x,
        input._weight,
        target,
        input._bias,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        transform=input._transform if input._steps else None,
    )


def _computed(value: Any) -> Any:
    return value.compute() if isinstance(value, LazyLogits) else value


def _keeps_last(index: Any, num_dims: int) -> bool:
    """Whether an index leaves the last dimension alone."""
    if isinstance(index, Tensor):
        return index.dtype == torch.bool and index.dim() < num_dims
    parts = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(part, int | slice | EllipsisType) for part in parts):
        return False
    if len([part for part in parts if part is not Ellipsis]) < num_dims and Ellipsis not in parts:
        return True
    return bool(parts[-1] == slice(None))
