"""What PEFT's own PaCA (0.22 and newer) would do with an adapter, or with a model that it made.

It adapts `nn.Linear` and quantised linear layers. It multiplies by a layer's weight itself, past a
forward of the layer's own; and it does not see who reads that weight without calling the layer, as
torch's attention and encoders do: there its outputs are silently those of the base.
"""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pacatune.tuner.attention import MultiheadAttention
from pacatune.tuner.layer import PacaLayer
from pacatune.tuner.parameter import ParameterLayer

__all__ = ["is_foreign", "kinds_beyond_peft"]


def kinds_beyond_peft(model: Any, adapter_name: str) -> list[str]:
    """Return the kinds of adapted modules that PEFT's own PaCA does not adapt rightly, sorted.

    Args:
        model: What has `named_modules`, with the adapter's layers in it.
        adapter_name: The adapter.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    kinds = {
        _kind_beyond_peft(layer, modules.get(name.rpartition(".")[0]))
        for name, layer in modules.items()
        if isinstance(layer, PacaLayer) and adapter_name in layer.r
    }
    return sorted(kinds - {""})


def is_foreign(module: nn.Module) -> bool:
    """Whether a module is a layer of PEFT's own PaCA."""
    is_paca = isinstance(module, BaseTunerLayer) and hasattr(module, "paca_indices")
    return is_paca and not isinstance(module, PacaLayer)


def _kind_beyond_peft(layer: PacaLayer, parent: nn.Module | None) -> str:
    base = layer.get_base_layer()
    if isinstance(parent, MultiheadAttention):
        return "MultiheadAttention"
    if isinstance(layer, ParameterLayer):
        return type(base).__name__
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "TransformerEncoderLayer"
    if layer.quantization_backend is not None:
        return "" if layer.quantization_backend.layer_type == "linear" else type(base).__name__
    is_linear = isinstance(base, nn.Linear) and type(base).forward is nn.Linear.forward
    return "" if is_linear else type(base).__name__
