"""Replaces an adapter's values in a running model by those of a saved adapter.

PEFT's own `hotswap_adapter` knows LoRA only. Swapping a PaCA adapter costs one copy per layer now
and one column write per layer at the next forward pass; no module is replaced.
"""

from pathlib import Path

from torch import nn

from pacatune.adapters.folder import Adapter, read_adapter
from pacatune.tuner import PacaLayer
from pacatune.tuner.columns import keep_columns

__all__ = ["hotswap_adapter"]


def hotswap_adapter(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> None:
    """Give the adapter `adapter_name` the columns, deltas and scaling of a saved one.

    An optimiser of the old adapter keeps its parameters where the ranks are equal.

    Args:
        model: A model with that adapter, PeftModel or not.
        folder: The saved adapter: a local folder or a hub id.
        adapter_name: The adapter to be replaced; it keeps its name.

    Raises:
        ValueError: If the two adapters do not adapt the same modules of the same shapes, or the
            adapter is merged; nothing has been changed then.
    """
    adapter = read_adapter(folder)
    layers = _layers_of(model, adapter_name)
    _check(layers, adapter, adapter_name)
    for name, layer in layers.items():
        update = adapter.modules[name]
        delta = layer.as_stored(update.delta)
        layer.replace_update(
            adapter_name, delta, update.indices, adapter.scaling(name) * len(update.indices)
        )
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is not None:
        config.selection = adapter.config.selection
        config.selection_options = adapter.config.selection_options
        keep_columns(config, {name: adapter.modules[name].indices for name in layers})


def _layers_of(model: nn.Module, adapter_name: str) -> dict[str, PacaLayer]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, PacaLayer) and adapter_name in module.r
    }


def _check(layers: dict[str, PacaLayer], adapter: Adapter, adapter_name: str) -> None:
    if not layers:
        raise ValueError(f"`adapter_name` ({adapter_name!r}) is no adapter of this model.")
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"Adapter {adapter_name!r} is merged; call `unmerge_adapter()` first.")
    difference = sorted(set(layers) ^ set(adapter.modules))
    if difference:
        raise ValueError(
            f"{adapter.folder} and adapter {adapter_name!r} do not adapt the same modules; only "
            f"one of them has {difference[:5]}. Load it under another name with `load_adapter`."
        )
    for name, layer in layers.items():
        delta, indices = adapter.modules[name]
        delta = layer.as_stored(delta)
        shape = layer.delta_shape(len(indices))
        if delta.shape != shape or int(indices.max()) >= layer.in_features:
            raise ValueError(
                f"{adapter.folder}: {name!r} has a delta of {tuple(delta.shape)} and columns up to "
                f"{int(indices.max())}, but the layer needs {shape} and has {layer.in_features} "
                "columns: it was made for another base model."
            )
