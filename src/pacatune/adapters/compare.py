"""Measure how alike two PaCA adapters are: the columns they chose and what they wrote there."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pacatune.adapters.folder import Adapter, read_adapter


@dataclass(frozen=True, kw_only=True)
class ModuleComparison:
    """One module that both adapters change."""

    name: str
    """In the base model."""
    rank_a: int
    """Columns of the first adapter."""
    rank_b: int
    """Columns of the second adapter."""
    num_shared_columns: int
    """Columns that both train."""
    cosine: float
    """Cosine of the two updates W' - W as vectors; 0 if either is zero."""
    norm_a: float
    """Frobenius norm of the first update."""
    norm_b: float
    """Frobenius norm of the second update."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two adapters side by side."""

    modules: list[ModuleComparison]
    """Modules of both."""
    only_a: list[str]
    """Modules of the first adapter alone."""
    only_b: list[str]
    """Modules of the second adapter alone."""
    cosine: float
    """Cosine of the whole updates, modules of one alone included."""
    norm_a: float
    """Frobenius norm of the whole first update."""
    norm_b: float
    """Frobenius norm of the whole second update."""


def compare(adapter_a: str | Path | Adapter, adapter_b: str | Path | Adapter) -> Comparison:
    """Compare the updates of two PaCA adapters, scaling included.

    Args:
        adapter_a: A folder, a hub id, or what `read_adapter` returned.
        adapter_b: The other one.

    Raises:
        FileNotFoundError: If one is missing.
        ValueError: If one is damaged, or they adapt modules of different sizes.
    """
    a, b = (x if isinstance(x, Adapter) else read_adapter(x) for x in (adapter_a, adapter_b))
    updates_a, updates_b = _scaled(a), _scaled(b)
    shared = [name for name in updates_a if name in updates_b]
    modules, dot = [], 0.0
    for name in shared:
        sizes_a, sizes_b = (_sizes(updates[name]) for updates in (updates_a, updates_b))
        if sizes_a != sizes_b:
            raise ValueError(
                f"module {name!r} has out_features and kernel {sizes_a} in {a.folder} but "
                f"{sizes_b} in {b.folder}; only adapters of one base can be compared."
            )
        module, module_dot = _compare_module(name, a, b, updates_a[name], updates_b[name])
        modules.append(module)
        dot += module_dot
    norm_a, norm_b = _norm(updates_a), _norm(updates_b)
    return Comparison(
        modules=modules,
        only_a=[name for name in updates_a if name not in updates_b],
        only_b=[name for name in updates_b if name not in updates_a],
        cosine=_cosine(dot, norm_a, norm_b),
        norm_a=norm_a,
        norm_b=norm_b,
    )


def _compare_module(
    name: str, a: Adapter, b: Adapter, update_a: Tensor, update_b: Tensor
) -> tuple[ModuleComparison, float]:
    # Only shared columns meet in the dot product; elsewhere one of the two updates is zero.
    indices_a, indices_b = a.modules[name].indices, b.modules[name].indices
    in_b = torch.isin(indices_a, indices_b)
    in_a = torch.isin(indices_b, indices_a)
    # Both index lists are sorted, so the shared columns come in the same order.
    dot = float((update_a[:, in_b] * update_b[:, in_a]).sum())
    norm_a, norm_b = float(update_a.norm()), float(update_b.norm())
    comparison = ModuleComparison(
        name=name,
        rank_a=len(indices_a),
        rank_b=len(indices_b),
        num_shared_columns=int(in_b.sum()),
        cosine=_cosine(dot, norm_a, norm_b),
        norm_a=norm_a,
        norm_b=norm_b,
    )
    return comparison, dot


def _scaled(adapter: Adapter) -> dict[str, Tensor]:
    return {
        name: update.delta.double() * adapter.scaling(name)
        for name, update in adapter.modules.items()
    }


def _sizes(update: Tensor) -> tuple[int, ...]:
    """All sizes but the rank."""
    return (*update.shape[:1], *update.shape[2:])


def _norm(updates: dict[str, Tensor]) -> float:
    return math.hypot(*(float(update.norm()) for update in updates.values()))


def _cosine(dot: float, norm_a: float, norm_b: float) -> float:
    return dot / (norm_a * norm_b) if norm_a and norm_b else 0.0
