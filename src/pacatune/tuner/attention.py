"""The adapted torch.nn.MultiheadAttention.

Torch's module reads the weights of its projections directly, in one function or, when it evaluates,
one fused kernel; it calls no layer that could be adapted. So the steps between are taken here, with
the same results up to rounding. What is trained is `in_proj_weight` (the same columns of query, key
and value projection), if the attention is a target, and `out_proj`, if that is one; both keep
x[..., indices] for backward and leave the weights alone.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from pacatune.format.options import IN_PROJ
from pacatune.ops.linear import add_columns, column_update
from pacatune.tuner.additive import has_hooks
from pacatune.tuner.layer import PacaLayer
from pacatune.tuner.parameter import (
    ParameterLayer,
    ParameterOwner,
    in_place_of_forward,
    names_to_apply,
)

# Keeps torch's fused inference of transformer encoders from passing by the adapter.
#
# nn.TransformerEncoderLayer evaluates by one kernel that reads the weights of its layers and never
# calls them; nn.TransformerEncoder then hands nested tensors to its layers. Each has an attribute
# that decides about it and about nothing else.


_SWITCHES: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
_KEPT = "_paca_fast_path"


def forbid_fast_path(model: nn.Module, *, everywhere: bool = False) -> None:
    """Let every encoder in which something is adapted call its layers, or every one."""
    for module in model.modules():
        for kind, switch in _SWITCHES.items():
            if not isinstance(module, kind):
                continue
            if everywhere or any(isinstance(m, PacaLayer) for m in module.modules()):
                module.__dict__.setdefault(_KEPT, getattr(module, switch))
                setattr(module, switch, False)


def allow_fast_path(model: nn.Module) -> None:
    """Undo `forbid_fast_path`."""
    for module in model.modules():
        for kind, switch in _SWITCHES.items():
            if isinstance(module, kind) and _KEPT in module.__dict__:
                setattr(module, switch, module.__dict__.pop(_KEPT))


@contextmanager
def without_fast_path(model: nn.Module) -> Iterator[None]:
    """Let every encoder call its layers for a while, so that hooks on them see what passes."""
    forbid_fast_path(model, everywhere=True)
    try:
        yield
    finally:
        allow_fast_path(model)


# What torch's own TransformerEncoder, and whoever knows the module, asks it for.
_FORWARDED = (
    *("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first"),
    *("in_proj_bias", "bias_k", "bias_v", "add_zero_attn", "_qkv_same_embed_dim"),
)


class AttentionInput(ParameterLayer):
    """The adapted (3E, E) weight of the query, key and value projections."""

    @staticmethod
    def check_base(base_layer: Any, name: str) -> None:
        """Refuse an attention without the one weight."""
        if base_layer.in_proj_weight is None:
            raise ValueError(
                f"Target module {name!r} has kdim={base_layer.kdim} and vdim={base_layer.vdim}; "
                f"both must be embed_dim={base_layer.embed_dim}, so that one weight holds all "
                "three projections."
            )


class MultiheadAttention(ParameterOwner):
    """In place of an nn.MultiheadAttention that has adapted parts.

    `out_proj` is a child of this module and no longer of the base layer, so that its names in the
    state_dict are those of the base model, adapted or not.
    """

    layer_class = AttentionInput

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.out_proj: Any = base_layer._modules.pop("out_proj")
        base_layer.__dict__["out_proj"] = self.out_proj

    def __getattr__(self, name: str) -> Any:
        if name in _FORWARDED:
            return getattr(self.base_layer, name)
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention's, with the same arguments."""
        base: Any = self.base_layer
        if not any(names_to_apply(layer) for layer in self._modules.values()):
            return base(*args, **kwargs)
        if has_hooks(base.__dict__):
            with in_place_of_forward(base, self._forward):
                return base(*args, **kwargs)
        return self._forward(*args, **kwargs)

    def _forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        base: Any = self.base_layer
        is_batched = query.dim() == 3
        batch_dim = 0 if base.batch_first or not is_batched else 1
        q, k, v = self._in_projection(query, key, value)
        q, k, v = (x.transpose(0, batch_dim) if is_batched else x.unsqueeze(0) for x in (q, k, v))
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        is_causal = is_causal and key_padding_mask is None and not need_weights
        masks = (None, None) if is_causal else (attn_mask, key_padding_mask)
        mask = _merged_mask(*masks, q, k, base.num_heads)
        if base.bias_k is not None:
            k = torch.cat([k, base.bias_k.expand(len(k), 1, -1)], 1)
            v = torch.cat([v, base.bias_v.expand(len(v), 1, -1)], 1)
        q, k, v = (x.unflatten(-1, (base.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        if base.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
        dropout = base.dropout if base.training else 0.0
        y, weights = _attend(q, k, v, mask, dropout, is_causal, need_weights)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if is_batched else weights.squeeze(0)
        return (y.transpose(0, batch_dim) if is_batched else y.squeeze(0)), weights

    def _in_projection(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        size: int = self.embed_dim
        if query is key and key is value:
            return self._project(query, slice(0, 3 * size)).chunk(3, -1)
        q = self._project(query, slice(0, size))
        if key is value:
            return (q, *self._project(key, slice(size, 3 * size)).chunk(2, -1))
        k = self._project(key, slice(size, 2 * size))
        return q, k, self._project(value, slice(2 * size, 3 * size))

    def _project(self, x: Tensor, rows: slice) -> Tensor:
        base: Any = self.base_layer
        bias = None if base.in_proj_bias is None else base.in_proj_bias[rows]
        weight = base.in_proj_weight[rows]
        y = F.linear(x, weight, bias)
        layer: Any = self._modules.get(IN_PROJ)
        for name in names_to_apply(layer):
            columns = x.index_select(-1, layer.paca_indices[name])
            apply = partial(_add_columns_of_rows, y, layer=layer, name=name, rows=rows)
            y = layer.paca_delta[name](columns, None, apply)
        return y

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the attention without anything of ours, merged if asked for."""
        base = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        out_proj: Any = self.out_proj
        if isinstance(out_proj, BaseTunerLayer):
            out_proj = out_proj.unload_and_optionally_merge_module(False, False, None)
        base.__dict__.pop("out_proj", None)
        base._modules["out_proj"] = out_proj
        return base


def _add_columns_of_rows(
    y: Tensor, columns: Tensor, delta: Tensor, *, layer: Any, name: str, rows: slice
) -> Tensor:
    weight, delta = layer.base_layer.in_proj_weight[rows], layer.expanded(name, delta)[rows]
    where = layer.paca_indices[name], layer.scaling[name], None
    return add_columns(y, columns, column_update(weight, delta, *where, y.dtype))


def _merged_mask(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    q: Tensor,
    k: Tensor,
    num_heads: int,
) -> Tensor | None:
    """Return both masks as what is added to the scores, (B, H, T, S) or what broadcasts to it.

    They are (T, S) or (B * H, T, S), and (B, S) or (S,): True or -inf where nobody looks.
    """
    merged = None
    if attn_mask is not None:
        shape = (-1, num_heads) if attn_mask.dim() == 3 else (1, 1)
        allowed = ((q.shape[1], k.shape[1]), (len(q) * num_heads, q.shape[1], k.shape[1]))
        if attn_mask.shape not in allowed:
            raise RuntimeError(
                f"`attn_mask` must be (T, S) or (B * H, T, S), here {allowed[0]} or {allowed[1]}, "
                f"got shape {tuple(attn_mask.shape)}."
            )
        merged = _to_add(attn_mask, q.dtype).reshape(*shape, q.shape[1], k.shape[1])
    if key_padding_mask is not None:
        padding = _to_add(key_padding_mask, q.dtype).view(len(q), 1, 1, k.shape[1])
        merged = padding if merged is None else merged + padding
    return merged


def _to_add(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise RuntimeError(f"A mask must be bool or floating, got {mask.dtype}.")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the attention's (B, H, T, D) output and, if needed, its (B, H, T, S) weights."""
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal), None
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights @ v, weights
