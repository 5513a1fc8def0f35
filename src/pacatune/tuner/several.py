"""Several adapters at once: added up to a new one exactly, or one for each row of a batch."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from pacatune.ops.columns import Update
from pacatune.strategies import FIXED
from pacatune.tuner.compat import Tuner
from pacatune.tuner.experts import ExpertParameter
from pacatune.tuner.layer import PacaLayer

# Adds adapters up to a new one, exactly: its columns are the union of theirs.


def add_weighted_adapter(
    tuner: Tuner, adapters: list[str], weights: list[float], adapter_name: str
) -> None:
    """Add the adapter whose update is the weighted sum of other adapters' updates.

    The sum of column updates is again a column update, over the union of the columns, so nothing
    is approximated; each layer's rank is the size of its union.
    """
    _check_combination(tuner, adapters, weights, adapter_name)
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in tuner.model.named_modules():
        if isinstance(layer, PacaLayer) and any(one in layer.paca_delta for one in adapters):
            sums[name] = _sum_of(layer, adapters, weights)
    ranks = {name: len(indices) for name, (_, indices) in sums.items()}
    rank = max(ranks.values())
    others = {name: value for name, value in ranks.items() if value != rank}
    parameters = [
        name for name in sums if isinstance(tuner.model.get_submodule(name), ExpertParameter)
    ]
    tuner.peft_config[adapter_name] = dataclasses.replace(
        tuner.peft_config[adapters[0]],
        r=rank,
        channels=None,
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
        combined.replace_update(adapter_name, Update(delta, indices, 1.0), len(indices))


def _check_combination(tuner: Tuner, adapters: list[str], weights: list[float], name: str) -> None:
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
    for one in adapters:
        config: Any = tuner.peft_config[one]
        if config.modules_to_save or config.trainable_token_indices or config.bias != "none":
            raise ValueError(
                f"Cannot add adapter {one!r}: it trains more than columns (`modules_to_save` "
                f"{config.modules_to_save}, `trainable_token_indices`, `bias`), of which there is "
                "no sum. Merge it, or train without."
            )
    if name in tuner.peft_config:
        raise ValueError(f"`adapter_name` ({name!r}) is taken; delete that adapter first.")


@torch.no_grad()
def _sum_of(layer: PacaLayer, adapters: list[str], weights: list[float]) -> tuple[Tensor, Tensor]:
    present = [(name, w) for name, w in zip(adapters, weights, strict=True) if name in layer.r]
    updates = [layer.delta_of(name).detach() for name, _ in present]
    indices = torch.cat([layer.paca_indices[name] for name, _ in present]).unique(sorted=True)
    delta = updates[0].new_zeros(layer.layout.delta_shape(len(indices)))
    for (name, weight), update in zip(present, updates, strict=True):
        places = torch.searchsorted(indices, layer.paca_indices[name])
        scaled = update.to(delta) * (weight * layer.scaling[name])
        delta.index_add_(layer.layout.delta_dim, places, scaled)
    return delta, indices


# Hands the rows' adapter names of a mixed batch to the layers, for one call of the model.


_LAYERS = (PacaLayer, AuxiliaryTrainingWrapper)


@contextmanager
def adapter_names_passed(
    model: nn.Module, adapter_names: list[str], num_beams: int
) -> Iterator[None]:
    """Let every adapted layer see which adapter each row is for, "__base__" for none.

    Generation repeats each row `num_beams` times.
    """
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    layers = [module for module in model.modules() if isinstance(module, _LAYERS)]
    _check(layers, adapter_names)
    repeated = [name for name in adapter_names for _ in range(num_beams)]
    handles = [_pass_names(layer, repeated) for layer in layers]
    encoder = _encoder_of(model)
    if num_beams > 1 and encoder is not None:  # an encoder sees each sample once
        handles += [
            _pass_names(module, adapter_names)
            for module in encoder.modules()
            if isinstance(module, _LAYERS)
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check(layers: list[Any], adapter_names: list[str]) -> None:
    if any(isinstance(layer, ExpertParameter) for layer in layers):
        raise ValueError(
            "Cannot pass `adapter_names` to a model with adapted experts, which see single tokens "
            "and not the rows of the batch. Run the rows of each adapter by themselves."
        )
    known = {"__base__"}
    known |= {name for layer in layers if isinstance(layer, PacaLayer) for name in layer.paca_delta}
    if unknown := set(adapter_names) - known:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}"
        )


def _pass_names(module: nn.Module, adapter_names: list[str]) -> Any:
    return module.register_forward_pre_hook(
        partial(_add_names, adapter_names=adapter_names), with_kwargs=True
    )


def _add_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], *, adapter_names: list[str]
) -> tuple[Any, dict[str, Any]]:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs


def _encoder_of(model: nn.Module) -> nn.Module | None:
    get_encoder = getattr(model, "get_encoder", None)
    encoder = get_encoder() if get_encoder is not None else None
    return encoder if encoder is not model else None
