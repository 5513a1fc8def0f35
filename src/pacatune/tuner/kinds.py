"""Which of our layers adapts which kind of module: the one table of what is supported."""

from typing import Any

from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from pacatune.tuner.attention import AttentionInput
from pacatune.tuner.convolution import Conv
from pacatune.tuner.embedding import Embedding
from pacatune.tuner.layer import PacaLayer
from pacatune.tuner.linear import Linear
from pacatune.tuner.quantized import QuantizedLinear

__all__ = ["is_supported", "layer_class", "supported_kinds"]

# Kinds of base modules, what to call them in messages, and the layer that adapts them.
_KINDS: tuple[tuple[tuple[type[nn.Module], ...], str, type[PacaLayer]], ...] = (
    ((nn.Linear,), "torch.nn.Linear", Linear),
    ((Conv1D,), "transformers' Conv1D", Linear),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), "torch.nn.Conv1d, Conv2d, Conv3d", Conv),
    ((nn.Embedding,), "torch.nn.Embedding", Embedding),
    ((nn.MultiheadAttention,), "torch.nn.MultiheadAttention", AttentionInput),
)


def layer_class(module: nn.Module, **kwargs: Any) -> type[PacaLayer] | None:
    """Return the class that adapts `module`, None if there is none.

    Args:
        module: A module of the base model.
        **kwargs: What PEFT needs to recognise quantised layers.
    """
    if resolve_quantization_backend(module, **kwargs) is not None:
        return QuantizedLinear
    for kinds, _, layer in _KINDS:
        if isinstance(module, kinds):
            return layer
    return None


def is_supported(module: nn.Module) -> bool:
    """Whether `module` is of an unquantised kind that can be adapted."""
    return any(isinstance(module, kinds) for kinds, _, _ in _KINDS)


def supported_kinds() -> str:
    """Return the names of all kinds, for messages."""
    names = ", ".join(name for _, name, _ in _KINDS)
    return f"{names}, quantised linear layers and, as `target_parameters`, the weights of experts"
