"""Attention with fewer key and value heads than query heads, keeping only those.

Where a backend cannot share a head of keys among several of queries (a mask, on most of them), the
heads are repeated, and plain autograd keeps the repeated ones: as much as the queries twice. Here
they are repeated once more in the backward pass.

What a backend keeps beside its inputs (the output, the logarithms of the sums, the state of
dropout) is its own matter, which `recompute` leaves to it.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from pacatune.lean.modules import LeanAttention, cut_of
from pacatune.lean.recompute import Cut, recompute
from pacatune.ops.products import autocast
from pacatune.ops.tracing import is_traced

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
    """
    # Cast as the backend would, but before anything is kept; the meta device knows no autocast.
    if torch.amp.is_autocast_available(query.device.type):
        query, key, value = map(autocast, (query, key, value))
    num_times = query.shape[1] // key.shape[1]

    def body(query: Tensor, key: Tensor, value: Tensor, cut: Cut) -> Tensor:
        return apply(query, *cut(repeat_heads(key, num_times), repeat_heads(value, num_times)))

    return recompute(body, (query, key, value))


# Puts `attend` between transformers' attention modules and its function for SDPA.
#
# Modules look the function up in a registry, by the name of the implementation, at each call. Once
# something was lean, the entry `sdpa` is ours: it serves lean modules, and hands every other call
# on.


ATTENTION = "sdpa"


def find_registry() -> Any:
    """Return transformers' registry of attention functions; None if it is not loaded."""
    transformers = sys.modules.get("transformers.modeling_utils")
    return getattr(transformers, "ALL_ATTENTION_FUNCTIONS", None)


def install() -> None:
    """Serve lean modules, from now on."""
    registry = find_registry()
    if not isinstance(registry[ATTENTION], _Dispatch):
        registry[ATTENTION] = _Dispatch(registry[ATTENTION])


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
        if not is_traced():
            query, key, value = cut_of(module)(query, key, value)
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


# Before, torch falls back to products of its own, which keep the scores of all pairs of tokens.
_CPU_SHARES_HEADS = torch.__version__ >= "2.9"  # github.com/pytorch/pytorch/pull/157893


def _shares_heads(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether nothing is repeated: torch's own kernels take fewer heads, if there is no mask."""
    if query.shape[1] == key.shape[1] or query.shape[2] == 1:
        return True
    is_shared = mask is None and key.shape[-1] == value.shape[-1] <= 256
    return is_shared and (query.device.type != "cpu" or _CPU_SHARES_HEADS)


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
