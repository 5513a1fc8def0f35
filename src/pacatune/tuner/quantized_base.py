"""What an adapter on a quantised base remembers: how that was rounded, where its columns started.

    dequantized   W[:, indices] of the quantised base; delta starts at zero
    original      the columns of the checkpoint before quantisation; delta starts at what rounding
                  took away, so that the columns are exact from the first step on

An `original` adapter therefore fits one rounding of the base only, and says so when it is loaded.
"""

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from pacatune.options import format_quantization
from pacatune.tuner.config import PacaConfig
from pacatune.tuner.original_columns import OriginalWeights
from pacatune.tuner.quantized import QuantizedLinear, dequantized

__all__ = ["Quantization", "describe", "find_originals", "settle_columns"]

Quantization = dict[str, Any]
"""What adapter_config.json says of the base: `method`, then what that method needs to repeat it."""


def find_originals(model: nn.Module, config: PacaConfig, **kwargs: Any) -> OriginalWeights | None:
    """Open the checkpoint of a new adapter whose columns start from it; None where none does.

    Args:
        model: The base, not changed.
        config: The adapter's configuration.
        **kwargs: What PEFT needs to recognise quantised layers.

    Raises:
        ValueError: If the base is not quantised, or its original weights cannot be had.
    """
    if config.columns_from != "original" or config.base_quantization or not config.init_weights:
        return None
    if 0 in (config.paca_alpha, *(config.alpha_pattern or {}).values()):
        raise ValueError(
            "`columns_from` ('original') starts from an update, which `paca_alpha` (0) would take "
            "away again; give another alpha."
        )
    if all(resolve_quantization_backend(module, **kwargs) is None for module in model.modules()):
        raise ValueError(
            "`columns_from` ('original') is for quantised bases, and this one is not: its columns "
            "are the original ones. Drop the option."
        )
    return OriginalWeights(model)


def settle_columns(
    model: nn.Module, config: PacaConfig, adapter_name: str, originals: OriginalWeights | None
) -> PacaConfig:
    """Start a new adapter's columns where its configuration says, or check a loaded one's base.

    Args:
        model: The base with the adapter's layers in it.
        config: The adapter's configuration; `base_quantization` is set if it was loaded.
        adapter_name: The adapter.
        originals: What `find_originals` found.

    Returns:
        The configuration to save: the same, or a copy that names the quantisation.

    Raises:
        ValueError: If the adapter starts from original columns and the base is not quantised as it
            was, or not from these original weights.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and adapter_name in module.r
    }
    current = describe(layers.values())
    if config.base_quantization is not None:
        _check_base(config, current)
        return config
    if originals is not None:
        _start_from(originals, layers, adapter_name)
    if current is None:
        return config
    config = copy.copy(config)
    config.base_quantization = current
    return config


def describe(layers: Iterable[QuantizedLinear]) -> Quantization | None:
    """Return how the bases of adapted layers are quantised, None if none is.

    Raises:
        ValueError: If they are quantised in different ways.
    """
    found: Quantization | None = None
    for layer in layers:
        one = _describe_one(layer.quantization_backend, layer.get_base_layer())
        if found is not None and one != found:
            raise ValueError(
                f"The target modules are quantised in different ways ({format_quantization(found)} "
                f"and {format_quantization(one)}); one adapter can be on one kind only. Choose "
                "`target_modules` of one kind."
            )
        found = one
    return found


def _describe_one(backend: Any, base_layer: Any) -> Quantization:
    name = str(backend.backend_name)
    weight = getattr(base_layer, "weight", None)
    if name == "bnb 4bit":
        state = getattr(weight, "quant_state", None) or base_layer.quant_state
        return {
            "method": "bitsandbytes",
            "type": state.quant_type,
            "block_size": state.blocksize,
            "double": bool(state.nested),
        }
    if name == "bnb 8bit":
        return {"method": "bitsandbytes", "type": "int8"}
    if name == "hqq":
        options = base_layer.quant_config["weight_quant_params"]
        return {"method": "hqq", "bits": options["nbits"], "group_size": options["group_size"]}
    if name == "torchao":
        blocks = list(getattr(weight, "block_size", None) or [])
        if blocks and blocks[-1] == base_layer.weight.shape[-1]:
            blocks[-1] = "row"  # one scale for a whole row, whatever the layer's size
        return {
            "method": "torchao",
            "type": type(weight).__name__,
            "dtype": str(getattr(weight, "target_dtype", "")).removeprefix("torch."),
            "block_size": blocks or None,
        }
    return {"method": name}


def _check_base(config: PacaConfig, current: Quantization | None) -> None:
    recorded = config.base_quantization
    if recorded == current:
        return
    assert recorded is not None
    before = format_quantization(recorded)
    here = f"quantised as {format_quantization(current)!r}" if current else "not quantised"
    if config.columns_from == "original":
        raise ValueError(
            f"The adapter was trained on a base quantised as {before!r}, with columns that start "
            f"from the original weights; this base is {here}, where its update would be wrong. "
            "Load the base as it was, or merge the adapter with `pacatune merge --base original`."
        )
    warnings.warn(
        f"The adapter was trained on a base quantised as {before!r}; this one is {here}, so its "
        "outputs differ by the rounding of the weights.",
        stacklevel=2,
    )


@torch.no_grad()
def _start_from(
    originals: OriginalWeights, layers: dict[str, QuantizedLinear], adapter_name: str
) -> None:
    for name, layer in layers.items():
        delta, indices = layer.delta_of(adapter_name), layer.paca_indices[adapter_name]
        rounded = dequantized(layer.quantization_backend, layer.base_layer, torch.float32)
        columns = originals.columns(name, indices, like=rounded)
        lost: Tensor = columns - rounded.index_select(1, indices)
        delta.copy_(lost / layer.scaling[adapter_name])
