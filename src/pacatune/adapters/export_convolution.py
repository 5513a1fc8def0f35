"""Factors of the LoRA that says what a PaCA adapter of a convolution says, where PEFT's LoRA can.

PEFT puts a convolution A from all input channels to the rank, with the kernel, stride and padding
of the layer, before a pointwise one B with the layer's groups. So one row of A is one kernel:

    one tap of one trained channel    B holds delta; a group needs as many rows as it has taps
    all taps of all of them           A holds delta, B the identity; a group needs its O/G outputs

Whichever needs fewer rows is exact. PEFT's A has no dilation and pads with zeros, whatever the
layer does; what differs there cannot be said in LoRA.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from pacatune.checks import PEFT_PREFIX
from pacatune.tuner.convolution import runs_torchs_forward

__all__ = [
    "convolution_factors",
    "convolution_notes",
    "convolution_patterns",
    "refuse_inexpressible",
]


def convolution_factors(
    update: Tensor, indices: Tensor, in_channels: int, groups: int
) -> tuple[Tensor, Tensor]:
    """Return the LoRA factors of an update of some input channels, exactly.

    Args:
        update: (O/G, R, *k).
        indices: (R,) sorted, of the I input channels.
        in_channels: I.
        groups: G.

    Returns:
        A (rank, I, *k) and B (O, rank/G, 1, ...): output channel o of group g sees A's rows of
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
        factor_b = torch.eye(out_per_group, dtype=update.dtype).repeat(groups, 1)
        return factor_a.flatten(0, 1), factor_b.view(*factor_b.shape, *ones)
    place = torch.arange(num_columns) - torch.searchsorted(group_of, group_of)
    taps = torch.arange(num_taps)
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
    """Return the patterns that give convolutions their own rank and the same alpha / rank.

    Args:
        tensors: The LoRA adapter's tensors.
        rank: That of all other modules.
        alpha: That of all other modules.
    """
    ranks = {f"^{re.escape(name)}": len(a) for name, (a, _) in _convolutions(tensors).items()}
    return {
        "rank_pattern": dict(ranks),
        "alpha_pattern": {name: alpha * own / rank for name, own in ranks.items()},
    }


def convolution_notes(tensors: dict[str, Tensor]) -> list[str]:
    """Say what convolutions cost as LoRA, and what PEFT does not do with them.

    Args:
        tensors: The LoRA adapter's tensors.
    """
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
    """Refuse a convolution that PEFT's LoRA would run in another way.

    Args:
        layer: The base's layer; its weight is not needed.
        where: Folder and module, the first words of the error.

    Raises:
        ValueError: If it is dilated, pads with something else than zeros, or is a subclass with a
            forward of its own.
    """
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
