"""Which columns of a weight are trained.

A strategy is a function with a name, chosen by `PacaConfig.selection`.
"""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Strategy", "register_strategy", "seed_for", "select_columns", "strategies"]

Strategy = Callable[[Tensor, Tensor | None, int, torch.Generator], Tensor]

_STRATEGIES: dict[str, Strategy] = {}


def register_strategy(name: str) -> Callable[[Strategy], Strategy]:
    """Make a function available as `PacaConfig(selection=name)`.

    Args:
        name: The strategy's name. The function takes (weight, statistics, rank, generator): the
            (O, I) weight (on the meta device where a strategy may need its shape only), what was
            gathered about it or None, the number of columns, and the layer's own seeded CPU
            generator; it returns (rank,) distinct int64 columns in any order.

    Raises:
        ValueError: If the name is taken.
    """

    def register(function: Strategy) -> Strategy:
        if name in _STRATEGIES:
            raise ValueError(
                f"`name` ({name!r}) is already a selection strategy; choose another one."
            )
        _STRATEGIES[name] = function
        return function

    return register


def strategies() -> list[str]:
    """Return the names of all registered strategies, sorted."""
    return sorted(_STRATEGIES)


def seed_for(random_seed: int, name: str) -> int:
    """Return a layer's own seed: (random_seed + crc32(name)) mod 2^63.

    The same on every rank, in every process and for every adapter name, and the rule of
    PEFT 0.22, so that the same seed chooses the same columns there.

    Args:
        random_seed: `PacaConfig.random_seed`.
        name: The module's name inside the base model, such as `model.layers.0.mlp.up_proj`.
    """
    return (random_seed + zlib.crc32(name.encode())) % 2**63


def select_columns(
    strategy: str,
    weight: Tensor,
    rank: int,
    *,
    seed: int,
    statistics: Tensor | None = None,
) -> Tensor:
    """Choose `rank` of a weight's input columns.

    Args:
        strategy: Name of a registered strategy.
        weight: (O, I) weight.
        rank: Number of columns.
        seed: The layer's seed, see `seed_for`.
        statistics: What the strategy needs to know beyond the weight, or None.

    Returns:
        (rank,) int64 on the CPU, sorted, distinct.

    Raises:
        ValueError: If the strategy is unknown, or what it returned is not `rank` distinct columns.
    """
    if strategy not in _STRATEGIES:
        raise ValueError(f"`selection` ({strategy!r}) must be one of {strategies()}.")
    generator = torch.Generator().manual_seed(seed)
    indices = _STRATEGIES[strategy](weight, statistics, rank, generator)
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
    weight: Tensor, statistics: Tensor | None, rank: int, generator: torch.Generator
) -> Tensor:
    """Choose uniformly without replacement (the paper's default, Sec. 3.1)."""
    # The clone lets go of the whole permutation.
    return torch.randperm(weight.shape[1], generator=generator, device="cpu")[:rank].clone()
