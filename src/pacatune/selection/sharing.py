"""The same columns for layers with the same input: query, key and value; gate and up."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pacatune.selection.statistics import ColumnStatistics
from pacatune.strategies import FIXED, needs_of, seed_for, select_columns, statistics_of
from pacatune.tuner.columns import find_targets
from pacatune.tuner.compat import get_quantization_kwargs
from pacatune.tuner.config import PacaConfig, seeded
from pacatune.tuner.quantized import weight_matrix
from pacatune.tuner.targets import Target

__all__ = ["share_columns"]

# Names of children of one module that are called with the same input, in Llama's words and BERT's.
_SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


def share_columns(
    model: nn.Module, config: PacaConfig, statistics: ColumnStatistics | None = None
) -> PacaConfig:
    """Choose the same columns for layers that have the same input.

    Gradients are summed over the layers of a group, and their weights are looked at as one weight
    with the rows of all. Random columns are those of the group's first layer.

    Args:
        model: The base; not changed.
        config: The adapter's configuration, without columns.
        statistics: What its `selection` needs.

    Returns:
        A copy of `config` with the groups' columns in `columns`; `choose_columns` chooses the rest.

    Raises:
        ValueError: If columns are given, statistics are missing, the rows have groups, or no
            layers share an input.
    """
    if config.columns is not None or config.selection == FIXED:
        raise ValueError(
            "`columns` are given, so none can be shared; drop them or `share_columns`."
        )
    if config.groups > 1:
        raise ValueError(
            f"`groups` ({config.groups}) have columns of their own in each layer; drop "
            "`share_columns`, or set `groups` to 1."
        )
    targets = find_targets(model, config)
    groups = _groups(targets)
    if not groups:
        raise ValueError(
            f"`share_columns`: of the {len(targets)} targets none have the same input by their "
            f"names ({'; '.join(', '.join(names) for names in _SAME_INPUT)}); leave it out."
        )
    columns: dict[str, list[int]] = {}
    config = seeded(config)
    for members in groups:
        chosen = _choose(model, {name: targets[name] for name in members}, config, statistics)
        columns |= {name: list(chosen) for name in members}
    config = copy.deepcopy(config)
    config.columns = columns
    return config


def _groups(targets: Mapping[str, Target]) -> list[list[str]]:
    """Return names of targets with the same parent, width and rank, two or more each."""
    found: dict[tuple[str, int, int, int], list[str]] = {}
    for name, target in targets.items():
        parent, _, last = name.rpartition(".")
        for number, names in enumerate(_SAME_INPUT):
            if last in names:
                key = (parent, number, target.num_columns, target.rank)
                found.setdefault(key, []).append(name)
    return [members for members in found.values() if len(members) > 1]


def _choose(
    model: nn.Module,
    members: Mapping[str, Target],
    config: PacaConfig,
    statistics: ColumnStatistics | None,
) -> list[int]:
    strategy = str(config.selection)
    first, target = next(iter(members.items()))
    merged: dict[str, Tensor] = {}
    found = [] if statistics is None else [statistics.of(name) for name in members]
    for kind in statistics_of(strategy) if found else ():
        values = [one[kind] for one in found if kind in one]
        if len(values) < len(found):
            break  # select_columns says what is missing
        # What is known about the input is the same for all.
        merged[kind] = torch.stack(values).sum(0) if kind == "gradient" else values[0]
    weight = torch.empty(1, target.num_columns, device="meta")
    if "weight" in needs_of(strategy):
        kwargs = get_quantization_kwargs(model)
        parts = [weight_matrix(t.module, t.parameter_name, **kwargs) for t in members.values()]
        weight = torch.cat(parts)
    seed = seed_for(config.random_seed, first)
    return select_columns(strategy, weight, target.rank, seed=seed, statistics=merged).tolist()
