"""Attention with fewer key and value heads than query heads, keeping only those.

Where a backend cannot share a head of keys among several of queries (a mask, on most of them), the
heads are repeated, and plain autograd keeps the repeated ones: as much as the queries twice. Here
they are repeated once more in the backward pass.

What a backend keeps beside its inputs (the output, the logarithms of the sums, the state of
dropout) is its own matter. So its graph is recorded inside a Function, every tensor that it wants
kept goes through `ctx.save_for_backward`, and the repeated heads are left out: the graph itself
holds nothing but numbers.
"""

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary

from pacatune.lean.fused import refuse_second_derivative
from pacatune.lean.modules import LeanAttention
from pacatune.ops.tracing import is_traced

__all__ = [
    "ATTENTION",
    "attend",
    "find_registry",
    "install",
    "repeat_heads",
    "uninstall",
]


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
    return _Attend.apply(query, key, value, apply, num_heads // num_kept)


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
    return _Source.apply(token, x)


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


# Puts `attend` between transformers' attention modules and its function for SDPA.
#
# Modules look the function up in a registry, by the name of the implementation, at each call. While
# something is lean, the entry `sdpa` is ours: it serves lean modules, and hands every other call
# on.


ATTENTION = "sdpa"
_attentions: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def find_registry() -> Any:
    """Return transformers' registry of attention functions; None if it is not loaded."""
    transformers = sys.modules.get("transformers.modeling_utils")
    return getattr(transformers, "ALL_ATTENTION_FUNCTIONS", None)


def install(attention: nn.Module) -> None:
    """Serve a lean module."""
    registry = find_registry()
    if attention not in _attentions:
        _attentions.add(attention)
        weakref.finalize(attention, _leave).atexit = False
    if not isinstance(registry[ATTENTION], _Dispatch):
        registry[ATTENTION] = _Dispatch(registry[ATTENTION])


def uninstall(attention: nn.Module) -> None:
    """Serve a module no longer; leave the registry when nobody is left."""
    _attentions.discard(attention)
    _leave()


def _leave() -> None:
    """Restore the registry unless a lean module is alive; the set may not know that one died."""
    registry = find_registry()
    is_needed = any(True for _ in _attentions)
    if registry is None or is_needed or not isinstance(registry[ATTENTION], _Dispatch):
        return
    plain = registry[ATTENTION].plain
    del registry[ATTENTION]
    if registry[ATTENTION] is not plain:  # somebody had put his own there before us
        registry[ATTENTION] = plain


class _Dispatch:
    """The attention function in the registry.

    Args:
        plain: The one that was there.
    """

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        if (
            not isinstance(module, LeanAttention)
            or not torch.is_grad_enabled()
            or is_traced()
            or _shares_heads(query, key, value, attention_mask)
            or not (query.requires_grad or key.requires_grad or value.requires_grad)
            or _is_trained(attention_mask, *kwargs.values())
        ):
            return self.plain(module, query, key, value, attention_mask, **kwargs)
        # With a bias, transformers builds that mask itself, out of one of bools.
        has_bias = kwargs.get("position_bias") is not None
        mask = attention_mask if has_bias else additive_mask(attention_mask, query)
        ungrouped = _Ungrouped(module)

        def apply(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            y, _ = self.plain(ungrouped, query, key, value, mask, **kwargs)
            return y

        return attend(query, key, value, apply), None


def _shares_heads(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether nothing is repeated: torch's own kernels take fewer heads, if there is no mask."""
    if query.shape[1] == key.shape[1] or query.shape[2] == 1:
        return True
    return mask is None and key.shape[-1] == value.shape[-1] <= 256


def _is_trained(*values: Any) -> bool:
    """Whether something beside query, key and value needs a gradient (learned biases)."""
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


class _Ungrouped:
    """A module as the attention function sees it when the heads are repeated already."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


# Made once per mask, which all layers share: torch would make, and keep, one in each layer.
_additive = WeakIdKeyDictionary()


def additive_mask(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Return a mask that says who is seen (True) as one that is added to the scores.

    Args:
        mask: (B, 1 or H, T, S), or None.
        query: In the dtype of the scores, but for autocast.

    Returns:
        One tensor for all layers, in the dtype of the scores; a mask of numbers as it is.
    """
    if mask is None or mask.dtype != torch.bool:
        return mask
    device_type, dtype = query.device.type, query.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    known = _additive.get(mask)
    if known is None or known[0] != mask._version or known[1].dtype != dtype:
        scores = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), -torch.inf)
        known = _additive[mask] = mask._version, scores
    return known[1]
