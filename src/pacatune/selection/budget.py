"""Where the trained columns are, with as many parameters in all as equal ranks have.

By gradients, each layer gets its own rank. By part, only attention, MLPs or output projections are
adapted, at a higher rank.
"""

import copy
import math
import re

from peft.tuners.tuners_utils import _find_minimal_target_modules
from torch import nn

from pacatune.format.options import IN_PROJ, target_of
from pacatune.selection.statistics import ColumnStatistics
from pacatune.tuner.columns import find_targets
from pacatune.tuner.config import PacaConfig
from pacatune.tuner.targets import Target

__all__ = ["PARTS", "allocate_ranks", "concentrate_ranks"]

PARTS = ("attention", "mlp", "output")
"""Parts of the blocks: the layers of attention, those of MLPs and experts, and the last layer of
each, which writes into the residual stream."""

_NUM_HALVINGS = 60
# Ends of names -> attention or mlp, and whether the layer is its last one. The first fit decides.
_ENDS = (
    (  # Llama, GPT-2, BERT, DistilBERT, T5, DeBERTa, torch, timm and others
        r"(q|k|v|qkv|query|key|value)_proj|qkv|Wqkv|query|key|value|query_key_value|c_attn"
        rf"|(q|k|v)_lin|\w*Attention\.(q|k|v)|self\.in_proj|{IN_PROJ}",
        "attention",
        False,
    ),
    (
        r"o_proj|out_proj|out_lin|\w*(attn|attention)\.(c_proj|proj|dense)"
        r"|attention\.output\.dense|\w*Attention\.o",
        "attention",
        True,
    ),
    (
        r"(gate|up|gate_up)_proj|fc1|c_fc|fc_in|lin1|wi|wi_0|wi_1|w1|w3|weights_in"
        r"|dense_h_to_4h|intermediate\.dense",
        "mlp",
        False,
    ),
    (
        r"down_proj|fc2|fc_out|lin2|wo|w2|weights_out|dense_4h_to_h|mlp\.c_proj|output\.dense",
        "mlp",
        True,
    ),
)


def allocate_ranks(
    model: nn.Module, config: PacaConfig, statistics: ColumnStatistics
) -> PacaConfig:
    """Give each layer a rank by its share of the gradient, within the parameters of equal ranks.

    Layer l, whose columns have O_l values, gets about c ||G_l|| values, with G_l all of its
    gradient and the largest c for which the sum of O_l r_l is not above that of equal ranks; at
    least one column and at most all. Updates keep their scale, that of `r`.

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
    scaling = config.paca_alpha / _divisor(config)
    config.use_rslora = False
    config.rank_pattern = chosen
    config.alpha_pattern = {name: scaling * rank for name, rank in chosen.items()}
    return config


def concentrate_ranks(model: nn.Module, config: PacaConfig, part: str) -> PacaConfig:
    """Adapt one part of the blocks alone, at the rank that trains as many parameters.

    With O_l values in a column of layer l, the rank is that nearest to r times the sum of O_l over
    all targets and divided by that over those of the part. Updates keep their scale,
    that of the rank `r`.

    Args:
        model: The base, with or without weights; not changed.
        config: The adapter's configuration: the targets among which the part is, and `r`, their
            rank if all were adapted.
        part: One of `PARTS`.

    Returns:
        A copy of `config` with other `target_modules`, `target_parameters`, `r` and `paca_alpha`.

    Raises:
        ValueError: If the part is unknown, the configuration has ranks by layer, a target's name
            does not say its part, none is of the part, or one has fewer columns than that rank.
    """
    if part not in PARTS:
        raise ValueError(f"`part` ({part!r}) must be one of {', '.join(PARTS)}.")
    if config.rank_pattern or config.alpha_pattern or config.columns:
        raise ValueError(
            f"`rank_pattern` ({config.rank_pattern}), `alpha_pattern` ({config.alpha_pattern}) or "
            f"`columns` are given, and `budget` ({part!r}) is to decide about ranks; drop them, or "
            "`budget`."
        )
    targets = find_targets(model, config)
    kept = {name: target for name, target in targets.items() if _is_in(name, part)}
    if not kept:
        raise ValueError(
            f"`budget` ({part!r}): none of the {len(targets)} targets, first "
            f"{next(iter(targets))!r}, is in this part; choose another one of {', '.join(PARTS)}, "
            "or other `target_modules`."
        )
    budget = config.r * sum(map(_values_per_column, targets.values()))
    rank = max(1, round(budget / sum(map(_values_per_column, kept.values()))))
    for name, target in kept.items():
        if rank > target.num_columns:
            raise ValueError(
                f"`budget` ({part!r}) gives {name!r} {rank} columns for the parameters of `r` "
                f"({config.r}) in all targets, and it has {target.num_columns}; lower `r`."
            )
    changed = copy.deepcopy(config)
    changed.target_modules = _names_of(model, kept)  # type: ignore[assignment]
    named = config.target_parameters or []
    changed.target_parameters = [one for one in named if any(_ends(name, one) for name in kept)]
    alpha = config.paca_alpha * rank / _divisor(config)
    changed.use_rslora = False
    changed.r, changed.paca_alpha = rank, int(alpha) if alpha == int(alpha) else alpha
    return changed


def _divisor(config: PacaConfig) -> float:
    """Return what `paca_alpha` is divided by."""
    return math.sqrt(config.r) if config.use_rslora else config.r


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


def _is_in(name: str, part: str) -> bool:
    for pattern, found, is_last in _ENDS:
        if re.search(rf"(^|\.)({pattern})$", name):
            return is_last if part == "output" else found == part
    raise ValueError(
        f"`budget` ({part!r}): the name {name!r} does not say whether it belongs to attention or "
        "to an MLP; name the layers to train in `target_modules` instead."
    )


def _names_of(model: nn.Module, kept: dict[str, Target]) -> set[str]:
    """Return what `target_modules` says of the targets that are modules, as short as can be."""
    modules = {name for name, _ in model.named_modules() if name and "base_layer" not in name}
    wanted = {target_of(name) for name in kept} & modules
    return _find_minimal_target_modules(wanted, modules - wanted) if wanted else set()


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")
