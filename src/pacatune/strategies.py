"""How columns are chosen: functions with a name, and what each of them must know.

    random                 uniformly, from a seed
    weight_norm            the largest ||W[:, i]||           weight_norm_smallest: the smallest
    gradient               the largest sum over batches of ||dW[:, i]||^2

Ties go to the first column, so that every process chooses the same ones. Torch only.

Source: PaCA, Sec. 5 (random, weight_norm, gradient).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "FIXED",
    "Strategy",
    "needs_of",
    "register_strategy",
    "seed_for",
    "select_columns",
    "strategies",
]


Strategy = Callable[["Tensor", Mapping[str, "Tensor"], int, "torch.Generator"], "Tensor"]

FIXED = "fixed"
"""What `PacaConfig.selection` says of columns that were given and not chosen."""
_NEEDS = ("weight", "gradient")


# Name -> function, and what it needs.
_STRATEGIES: dict[str, tuple[Strategy, tuple[str, ...]]] = {}


def register_strategy(name: str, needs: tuple[str, ...] = ()) -> Callable[[Strategy], Strategy]:
    """Make a function available as `PacaConfig(selection=name)`.

    Args:
        name: The strategy's name. The function takes (weight, statistics, rank, generator): the
            weight as a matrix with a column for each of the I columns to choose from, what was
            collected about them (by kind, see `ColumnStatistics`), the number of columns, and the
            layer's own seeded CPU generator; it returns (rank,) distinct int64 columns in any
            order.
        needs: What it looks at: "weight", and statistics ("gradient"). A weight that is not needed
            is on the meta device and has a shape only.

    Raises:
        ValueError: If the name is taken, or `needs` names something else.
    """
    unknown = sorted(set(needs) - {*_NEEDS})
    if unknown:
        raise ValueError(f"`needs` ({unknown}) must be among {_NEEDS}.")

    def register(function: Strategy) -> Strategy:
        if name in _STRATEGIES or name == FIXED:
            raise ValueError(
                f"`name` ({name!r}) is already a selection strategy; choose another one."
            )
        _STRATEGIES[name] = function, tuple(needs)
        return function

    return register


def strategies() -> list[str]:
    """Return the names of all registered strategies, sorted."""
    return sorted(_STRATEGIES)


def needs_of(strategy: str) -> tuple[str, ...]:
    """Return what a strategy looks at: "weight" and "gradient".

    Raises:
        ValueError: If the strategy is unknown.
    """
    if strategy not in _STRATEGIES:
        raise ValueError(
            f"`selection` ({strategy!r}) must be one of {strategies()}, or a dictionary of module "
            "names and columns."
        )
    return _STRATEGIES[strategy][1]


def seed_for(random_seed: int | None, name: str) -> int:
    """Return a layer's own seed: (random_seed + crc32(name)) mod 2^63.

    The same on every rank, in every process and for every adapter name, and the rule of
    PEFT 0.22, so that the same seed chooses the same columns there.

    Args:
        random_seed: `PacaConfig.random_seed`, any integer; % is Python's, so never negative. None
            has been replaced by one that was drawn, see `tuner.config.seeded`.
        name: The module's name inside the base model, such as `model.layers.0.mlp.up_proj`.
    """
    assert random_seed is not None, "whoever makes an adapter draws its seed first"
    return (random_seed + zlib.crc32(name.encode())) % 2**63


def select_columns(
    strategy: str,
    weight: Tensor,
    rank: int,
    *,
    seed: int,
    statistics: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Choose `rank` of a weight's input columns.

    Args:
        strategy: Name of a registered strategy.
        weight: (O, I) weight.
        rank: Number of columns.
        seed: The layer's seed, see `seed_for`.
        statistics: Kind -> (I,) what was collected about the columns.

    Returns:
        (rank,) int64 on the CPU, sorted, distinct.

    Raises:
        ValueError: If the strategy is unknown, it needs what is not there, or what it returned is
            not `rank` distinct columns.
    """
    import torch

    statistics = statistics or {}
    needs = needs_of(strategy)
    missing = [kind for kind in needs if kind != "weight" and kind not in statistics]
    if missing:
        raise ValueError(
            f"`selection` ({strategy!r}) needs statistics of the kind {' and '.join(missing)}: "
            "collect them with pacatune.selection.collect_statistics and choose with "
            "choose_columns, before the adapter is made."
        )
    if "weight" in needs and weight.is_meta:
        raise ValueError(
            f"`selection` ({strategy!r}) looks at the weights, which are on the meta device: load "
            "them first."
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        indices = _STRATEGIES[strategy][0](weight, statistics, rank, generator)
    indices = indices.detach().to("cpu", torch.int64).sort().values
    in_features = weight.shape[1]
    is_valid = (
        indices.shape == (rank,)
        and (rank == 0 or (int(indices[0]) >= 0 and int(indices[-1]) < in_features))
        and bool((indices.diff() > 0).all())
    )
    if not is_valid:
        raise ValueError(
            f"`selection` ({strategy!r}) must return {rank} distinct columns in "
            f"[0, in_features={in_features}), got {indices.tolist()}."
        )
    return indices


@register_strategy("random")
def select_random(
    weight: Tensor, statistics: Mapping[str, Tensor], rank: int, generator: torch.Generator
) -> Tensor:
    """Choose uniformly without replacement (the paper's default, Sec. 3.1)."""
    import torch

    # The clone lets go of the whole permutation.
    return torch.randperm(weight.shape[1], generator=generator, device="cpu")[:rank].clone()


def _register_scores(name: str, needs: str, score: Callable[..., Tensor]) -> None:
    """Register the strategy that chooses the columns of the largest `score(weight, statistics)`."""

    def select(
        weight: Tensor, statistics: Mapping[str, Tensor], rank: int, generator: torch.Generator
    ) -> Tensor:
        scores = score(weight, statistics)
        return scores.sort(descending=True, stable=True).indices[:rank]

    register_strategy(name, (needs,))(select)


def _norms(weight: Tensor) -> Tensor:
    import torch

    dtype = torch.promote_types(weight.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(weight, dim=0, dtype=dtype)
    return norms


_register_scores("weight_norm", "weight", lambda weight, statistics: _norms(weight))
_register_scores("weight_norm_smallest", "weight", lambda weight, statistics: -_norms(weight))
_register_scores("gradient", "gradient", lambda weight, statistics: statistics["gradient"])
