"""The factors of the LoRA that says what a PaCA adapter says, and the names that PEFT gives them.

    linear       A (R, I) selects the columns, B (O, R) = delta
    embedding    A (R, V) = delta^T, B (D, R) selects the dimensions
    experts      A and B hold the factors of all E experts: A the selector E times, B the deltas
    convolution  see below

A layer of lower rank than another is filled up with zeros.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from pacatune.adapters.folder import Adapter
from pacatune.adapters.target import target_of_module
from pacatune.format.tensors import PEFT_PREFIX
from pacatune.installation import require
from pacatune.tuner.convolution import runs_torchs_forward
from pacatune.tuner.layout import (
    ConvolutionLayout,
    EmbeddingLayout,
    ExpertsLayout,
    is_transposed,
    takes_all_tokens,
)


def spread(mix: Tensor, indices: Tensor, in_features: int, rank: int | None = None) -> Tensor:
    """Return the (rank, I) matrix A with A x = mix x[indices]; rows beyond those of mix are zeros.

    Args:
        mix: (R, C), (R, C, *k) of a convolution, or (E, R, C) with `rank`, of experts.
        indices: (C,) of I columns.
        in_features: I.
        rank: Number of rows; R where None.
    """
    if rank is None:
        return mix.new_zeros(len(mix), in_features, *mix.shape[2:]).index_copy(1, indices, mix)
    factor = mix.new_zeros(*mix.shape[:-2], rank, in_features)
    factor[..., : mix.shape[-2], indices] = mix
    return factor


def rounded_factor(factor: Tensor, dtype: torch.dtype, where: str) -> tuple[Tensor, float]:
    """Return a factor as it is written, and by what share of its size that was rounded."""
    rounded = factor.to(dtype).contiguous()
    if not rounded.isfinite().all():
        raise ValueError(
            f"{where} holds {float(factor.abs().max()):.0e}, too big for {dtype}; export in "
            "float32 or bfloat16."
        )
    return rounded, float((rounded.double() - factor).norm() / factor.norm().clamp(min=1e-30))


def lora_factors(
    adapter: Adapter, base: nn.Module, name: str, times: float, rank: int
) -> dict[str, Tensor]:
    """Return the factors of one layer by their names in PEFT's file, without its prefix.

    They are exact: in float64, the update multiplied by `times`, filled up to the rank.
    """
    target = target_of_module(base, name)
    layout = target.layout
    own = adapter.modules[name]
    indices, update = own.indices, own.delta.double() * times
    if isinstance(layout, ConvolutionLayout):
        refuse_inexpressible(target.module, f"{adapter.folder}: module {name!r}")
        if own.mix is not None and layout.groups == 1:
            factor_b = update.view(*update.shape, *[1] * len(layout.kernel_size))
            return _named(name, spread(own.mix.double(), indices, layout.in_features), factor_b)
        dense = own.dense().double() * times
        return _named(name, *convolution_factors(dense, indices, layout.in_features, layout.groups))
    mix = torch.eye(len(indices), device="cpu") if own.mix is None else own.mix
    selector = spread(mix.double(), indices, layout.in_features, rank)
    filled = update.new_zeros(len(update), rank, *update.shape[2:])
    filled[:, : update.shape[1]] = update
    if isinstance(layout, ExpertsLayout):
        return _experts_factors(adapter, target.module, name, selector, filled)
    if isinstance(layout, EmbeddingLayout):
        return {f"{name}.lora_embedding_A": filled.t(), f"{name}.lora_embedding_B": selector.t()}
    return _named(name, selector, filled)


def _named(name: str, factor_a: Tensor, factor_b: Tensor) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": factor_a, f"{name}.lora_B.weight": factor_b}


def _experts_factors(
    adapter: Adapter, experts: nn.Module, name: str, selector: Tensor, update: Tensor
) -> dict[str, Tensor]:
    """Return A (E * rank, I), expert by expert, and B (O, rank * E), rank by rank."""
    # Older ones take (E, O, I) for (E, I, O), and 0.18 does so with Llama 4's.
    least = "0.19" if takes_all_tokens(experts) else "0.18" if is_transposed(experts) else "0.20"
    require("PEFT", least, f"LoRA for the experts of {adapter.folder}")
    owner, _, parameter_name = name.rpartition(".")
    # PEFT wraps the module once for each parameter, in the order in which the module has them.
    adapted = [other for other in experts._parameters if f"{owner}.{other}" in adapter.modules]
    depth = len(adapted) - 1 - adapted.index(parameter_name)
    selector = selector.expand(update.shape[2], -1, -1)
    where = owner + ".base_layer" * depth
    if takes_all_tokens(experts):
        # Llama 4, whose (E, I, O) PEFT takes for (E, O, I): its input is our output.
        factor_b = selector.permute(2, 1, 0).flatten(1)
        return _named(where, update.permute(2, 1, 0).flatten(0, 1), factor_b)
    return _named(where, selector.flatten(0, 1), update.flatten(1))


# Factors of the LoRA that says what a PaCA adapter of a convolution says, where PEFT's LoRA can.
#
# PEFT puts a convolution A from all input channels to the rank, with the kernel, stride and padding
# of the layer, before a pointwise one B with the layer's groups. So one row of A is one kernel:
#
#     one tap of one trained channel    B holds delta; a group needs as many rows as it has taps
#     all taps of all of them           A holds delta, B the identity; a group needs its O/G outputs
#
# Whichever needs fewer rows is exact. PEFT's A has no dilation and pads with zeros, whatever the
# layer does; what differs there cannot be said in LoRA.


def convolution_factors(
    update: Tensor, indices: Tensor, in_channels: int, groups: int
) -> tuple[Tensor, Tensor]:
    """Return the LoRA factors of an (O/G, R, *k) update of some input channels, exactly.

    They are A (rank, I, *k) and B (O, rank/G, 1, ...): output channel o of group g sees A's rows of
    group g only, as in a convolution with G groups.
    """
    out_per_group, num_columns, *kernel_size = update.shape
    num_taps = math.prod(kernel_size)
    group_of = indices // (in_channels // groups)
    most = int(group_of.bincount().max())
    ones = [1] * len(kernel_size)
    if most * num_taps >= out_per_group:
        factor_a = update.new_zeros(groups, out_per_group, in_channels, *kernel_size)
        factor_a[group_of, :, indices] = update.transpose(0, 1)
        identity = torch.eye(out_per_group, dtype=update.dtype, device=update.device)
        factor_b = identity.repeat(groups, 1)
        return factor_a.flatten(0, 1), factor_b.view(*factor_b.shape, *ones)
    place = torch.arange(num_columns, device=update.device) - torch.searchsorted(group_of, group_of)
    taps = torch.arange(num_taps, device=update.device)
    factor_a = update.new_zeros(groups, most, num_taps, in_channels, num_taps)
    factor_a[group_of[:, None], place[:, None], taps, indices[:, None], taps] = 1
    factor_b = update.new_zeros(groups, out_per_group, most, num_taps)
    factor_b[group_of, :, place] = update.flatten(2).transpose(0, 1)
    rank = groups * most * num_taps
    return (
        factor_a.view(rank, in_channels, *kernel_size),
        factor_b.view(groups * out_per_group, most * num_taps, *ones),
    )


def convolution_patterns(
    tensors: dict[str, Tensor], rank: int, alpha: float
) -> dict[str, dict[str, float]]:
    """Return the patterns that give convolutions their own rank and the same alpha / rank."""
    ranks = {f"^{re.escape(name)}": len(a) for name, (a, _) in _convolutions(tensors).items()}
    return {
        "rank_pattern": dict(ranks),
        "alpha_pattern": {name: alpha * own / rank for name, own in ranks.items()},
    }


def convolution_notes(tensors: dict[str, Tensor]) -> list[str]:
    """Say what convolutions cost as LoRA, and what PEFT does not do with them."""
    factors = _convolutions(tensors)
    if not factors:
        return []
    num_bytes = sum(a.nbytes + b.nbytes for a, b in factors.values())
    notes = [
        f"{len(factors)} convolutions have ranks of their own, up to "
        f"{max(len(a) for a, _ in factors.values())}; they take {num_bytes / 1e6:.1f} MB."
    ]
    if num_grouped := sum(len(a) != b.shape[1] for a, b in factors.values()):
        notes.append(
            f"PEFT runs LoRA on {num_grouped} convolutions with groups but cannot merge it."
        )
    return notes


def _convolutions(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    suffix = ".lora_A.weight"
    return {
        key.removeprefix(PEFT_PREFIX).removesuffix(suffix): (
            factor_a,
            tensors[key.replace(suffix, ".lora_B.weight")],
        )
        for key, factor_a in tensors.items()
        if key.endswith(suffix) and factor_a.ndim > 2
    }


def refuse_inexpressible(layer: nn.Module, where: str) -> None:
    """Refuse a convolution that PEFT's LoRA would run in another way."""
    conv: Any = layer
    wide = [size > 1 for size in conv.kernel_size]
    if any(step > 1 for step, is_wide in zip(conv.dilation, wide, strict=True) if is_wide):
        problem = f"dilation = {conv.dilation}"
    elif conv.padding_mode != "zeros" and any(conv._reversed_padding_repeated_twice):
        problem = f"padding_mode = {conv.padding_mode!r}"
    elif not runs_torchs_forward(layer):
        problem = f"a forward of its own ({type(layer).__name__})"
    else:
        return
    raise ValueError(
        f"{where} is a convolution with {problem}, which PEFT's LoRA does not follow; merge the "
        "adapter instead (`pacatune merge`)."
    )
