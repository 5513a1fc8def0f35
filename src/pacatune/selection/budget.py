"""Ranks by layer: more columns where gradients are large, as many parameters in all."""

import copy
import math

from torch import nn

from pacatune.selection.statistics import ColumnStatistics
from pacatune.tuner.columns import find_targets
from pacatune.tuner.config import PacaConfig
from pacatune.tuner.targets import Target

__all__ = ["allocate_ranks"]

_NUM_HALVINGS = 60


def allocate_ranks(
    model: nn.Module, config: PacaConfig, statistics: ColumnStatistics
) -> PacaConfig:
    """Give each layer a rank by its share of the gradient, within the parameters of equal ranks.

    Layer l, whose columns have O_l values, gets about c ||G_l|| values, with G_l all of its
    gradient and the largest c for which the sum of O_l r_l is not above that of equal ranks; at
    least one column and at most all. Updates keep their scale, paca_alpha / r.

    Args:
        model: The base; not changed.
        config: The adapter's configuration: `r` is the mean to keep to.
        statistics: Has `gradient` of each target.

    Returns:
        A copy of `config` with `rank_pattern` and `alpha_pattern`.

    Raises:
        ValueError: If the configuration has ranks by layer already, or statistics are missing.
    """
    if config.rank_pattern or config.alpha_pattern:
        raise ValueError(
            f"`rank_pattern` ({config.rank_pattern}) and `alpha_pattern` ({config.alpha_pattern}) "
            "are what gradients are to decide about; drop them, or `budget`."
        )
    targets = find_targets(model, config)
    masses = {name: _mass(statistics, name) for name in targets}
    heights = {name: _values_per_column(target) for name, target in targets.items()}
    budget = sum(config.r * height for height in heights.values())

    def ranks(scale: float) -> dict[str, int]:
        return {
            name: min(max(1, round(scale * masses[name] / heights[name])), target.num_columns)
            for name, target in targets.items()
        }

    low, high = 0.0, budget * 2.0 / min(mass for mass in masses.values() if mass > 0)
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        spent = sum(rank * heights[name] for name, rank in ranks(middle).items())
        low, high = (middle, high) if spent <= budget else (low, middle)
    chosen = ranks(low)
    config = copy.deepcopy(config)
    scaling = config.paca_alpha / config.r
    config.rank_pattern = chosen
    config.alpha_pattern = {name: scaling * rank for name, rank in chosen.items()}
    return config


def _mass(statistics: ColumnStatistics, name: str) -> float:
    """Return ||G||, the norm of a layer's accumulated gradient."""
    found = statistics.of(name)
    if "gradient" not in found:
        raise ValueError(
            f"`statistics` has no gradient of {name!r}, by which ranks are allotted; collect with "
            "kinds=['gradient', ...]."
        )
    return math.sqrt(float(found["gradient"].sum()))


def _values_per_column(target: Target) -> int:
    weight = getattr(target.module, target.parameter_name)
    if not weight.is_floating_point():  # packed: its own shape says nothing
        return target.layout.out_features
    return target.layout.matrix(weight.detach()).shape[0]
