"""Attention with fewer key and value heads than query heads, keeping only those.

Where a backend cannot share a head of keys among several of queries (a mask, on most of them), the
heads are repeated, and plain autograd keeps the repeated ones: as much as the queries twice. Here
they are repeated once more in the backward pass.

What a backend keeps beside its inputs (the output, the logarithms of the sums, the state of
dropout) is its own matter. So its graph is recorded inside a Function, every tensor that it wants
kept goes through `ctx.save_for_backward`, and the repeated heads are left out: the graph itself
holds nothing but numbers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from pacatune.lean.tracing import refuse_second_derivative

__all__ = ["attend", "repeat_heads"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def repeat_heads(x: Tensor, num_times: int) -> Tensor:
    """Repeat each head for the queries of its group: (B, K, T, D) -> (B, K * num_times, T, D)."""
    batch, heads, length, dim = x.shape
    repeated = x[:, :, None].expand(batch, heads, num_times, length, dim)
    return repeated.reshape(batch, heads * num_times, length, dim)


def attend(query: Tensor, key: Tensor, value: Tensor, apply: Attend) -> Tensor:
    """Apply attention to repeated heads of keys and values, keeping the heads as they are.

    Forward   y = apply(query, repeated key, repeated value)
    Backward  that of `apply`, with the heads repeated again
    Saves query, key, value, and what `apply` keeps beside them.

    Args:
        query: (B, H, T, D).
        key: (B, K, S, D), where K divides H.
        value: (B, K, S, E).
        apply: Takes query, key and value of H heads each.

    Returns:
        What `apply` returns.

    Raises:
        ValueError: If K does not divide H.
    """
    num_heads, num_kept = query.shape[1], key.shape[1]
    if num_heads % num_kept:
        raise ValueError(
            f"`key` has {num_kept} heads, which must divide the {num_heads} heads of `query`."
        )
    device_type = query.device.type
    # Cast as the backend would, but before anything is kept; the meta device knows no autocast.
    is_known = torch.amp.is_autocast_available(device_type)
    if is_known and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return _Attend.apply(query, key, value, apply, num_heads // num_kept)  # type: ignore[no-any-return]


class _Source(torch.autograd.Function):
    """Makes a tensor a beginning of a graph without the graph holding it, as a leaf would be."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        raise AssertionError("gradients are taken before they come here")


class _Attend(torch.autograd.Function):
    """See `attend`."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, apply: Attend, num_times: int
    ) -> Tensor:
        ctx.num_times = num_times
        if not any(ctx.needs_input_grad):
            return apply(query, repeat_heads(key, num_times), repeat_heads(value, num_times))
        kept = _Kept([query, key, value])
        with torch.enable_grad():
            sources = [
                _source(x) if needed else x
                for x, needed in zip((query, key, value), ctx.needs_input_grad[:3], strict=True)
            ]
            heads = [sources[0], *(repeat_heads(x, num_times) for x in sources[1:])]
            kept.know(heads)
            with saved_tensors_hooks(kept.pack, kept.unpack):
                y = apply(*heads)
        ctx.edges = [get_gradient_edge(x) for x in sources if x.grad_fn is not None]
        ctx.edge, ctx.kept = get_gradient_edge(y), kept
        y = y.detach()
        ctx.save_for_backward(*kept.forget())
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("Lean attention")
        query, key, value, *others = ctx.saved_tensors
        heads = [query, *(repeat_heads(x, ctx.num_times) for x in (key, value))]
        ctx.kept.remember(heads, others)
        try:
            gradients = iter(
                torch.autograd.grad(ctx.edge, ctx.edges, gy, retain_graph=True, allow_unused=True)
            )
        finally:
            ctx.kept.forget()
        found = [next(gradients) if needed else None for needed in ctx.needs_input_grad[:3]]
        return (*found, None, None)


def _source(x: Tensor) -> Tensor:
    token = torch.empty(0, device=x.device, requires_grad=True)
    return _Source.apply(token, x)  # type: ignore[no-any-return]


class _Kept:
    """Turns what a graph keeps into numbers: of a head tensor and its geometry, or of another.

    Args:
        inputs: What is kept in any case; the same tensors are not kept twice.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        self._inputs = inputs
        self._heads: list[Tensor] = []
        self._others: list[Tensor] = []

    def know(self, heads: list[Tensor]) -> None:
        """Leave these out: they will be made again."""
        self._heads = [x.detach() for x in heads]

    def pack(self, x: Tensor) -> tuple[Any, ...]:
        """Return what stands for a tensor that the graph keeps."""
        for number, head in enumerate(self._heads):
            # Not its address: tensors without memory (meta, fake) have none.
            if x.untyped_storage()._cdata == head.untyped_storage()._cdata:
                return number, x.size(), x.stride(), x.storage_offset() - head.storage_offset()
        self._others.append(x.detach())
        return (len(self._others) - 1,)

    def unpack(self, token: tuple[Any, ...]) -> Tensor:
        """Return the tensor again."""
        if len(token) == 1:
            return self._others[int(token[0])]
        number, size, stride, offset = token
        head: Tensor = self._heads[number]
        return head.as_strided(size, stride, head.storage_offset() + int(offset))

    def remember(self, heads: list[Tensor], others: list[Tensor]) -> None:
        """Have at hand what `unpack` returns."""
        self._heads, self._others = heads, others

    def forget(self) -> list[Tensor]:
        """Hold nothing from now on; return what is to be kept."""
        kept = [*self._inputs, *self._others]
        self._inputs, self._heads, self._others = [], [], []
        return kept
