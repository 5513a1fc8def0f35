"""Adds adapters up to a new one, exactly: its columns are the union of theirs."""

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pacatune.options import target_of
from pacatune.selection.strategies import FIXED
from pacatune.tuner.experts import ExpertParameter
from pacatune.tuner.layer import PacaLayer

if TYPE_CHECKING:
    from pacatune.tuner.model import PacaModel

__all__ = ["add_weighted_adapter"]


def add_weighted_adapter(
    tuner: "PacaModel", adapters: list[str], weights: list[float], adapter_name: str
) -> None:
    """Add the adapter whose update is the weighted sum of other adapters' updates.

    The sum of column updates is again a column update, over the union of the columns, so nothing
    is approximated; each layer's rank is the size of its union.

    Args:
        tuner: The tuner of the model.
        adapters: Names of the adapters to add up.
        weights: One factor per adapter.
        adapter_name: Name of the new adapter.

    Raises:
        ValueError: If names and weights do not fit together, an adapter does not exist, or the
            new name is taken.
    """
    _check(tuner, adapters, weights, adapter_name)
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in tuner.model.named_modules():
        if isinstance(layer, PacaLayer) and any(one in layer.paca_delta for one in adapters):
            sums[name] = _sum_of(layer, adapters, weights)
    ranks = {target_of(name): len(indices) for name, (_, indices) in sums.items()}
    rank = max(ranks.values())
    others = {name: value for name, value in ranks.items() if value != rank}
    parameters = [
        name for name in sums if isinstance(tuner.model.get_submodule(name), ExpertParameter)
    ]
    tuner.peft_config[adapter_name] = dataclasses.replace(
        tuner.peft_config[adapters[0]],
        r=rank,
        paca_alpha=rank,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(set(ranks) - set(parameters)),
        target_parameters=parameters,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        selection=FIXED,
        selection_options=None,
        columns={name: indices.tolist() for name, (_, indices) in sums.items()},
    )
    tuner.inject_adapter(tuner.model, adapter_name)
    for name, (delta, indices) in sums.items():
        combined = tuner.model.get_submodule(name)
        assert isinstance(combined, PacaLayer)
        # PEFT makes it in the dtype of the base, which would round the sum.
        combined.paca_delta[adapter_name].to(delta.dtype)
        combined.replace_update(adapter_name, delta, indices, len(indices))


def _check(tuner: "PacaModel", adapters: list[str], weights: list[float], name: str) -> None:
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"`adapters` ({len(adapters)}) and `weights` ({len(weights)}) must have the same "
            "length, at least 1."
        )
    unknown = sorted(set(adapters) - set(tuner.peft_config))
    if unknown:
        raise ValueError(
            f"`adapters`: {unknown} do not exist; the model has {sorted(tuner.peft_config)}."
        )
    if name in tuner.peft_config:
        raise ValueError(f"`adapter_name` ({name!r}) is taken; delete that adapter first.")


@torch.no_grad()
def _sum_of(layer: PacaLayer, adapters: list[str], weights: list[float]) -> tuple[Tensor, Tensor]:
    present = [(name, w) for name, w in zip(adapters, weights, strict=True) if name in layer.r]
    indices = torch.cat([layer.paca_indices[name] for name, _ in present]).unique(sorted=True)
    delta = layer.delta_of(present[0][0]).new_zeros(layer.delta_shape(len(indices)))
    for name, weight in present:
        places = torch.searchsorted(indices, layer.paca_indices[name])
        update = layer.delta_of(name).to(delta) * (weight * layer.scaling[name])
        delta.index_add_(layer.delta_dim, places, update)
    return delta, indices
