"""Which of our layers adapts which kind of module: the one table of what is supported."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from pacatune.tuner.attention import AttentionInput
from pacatune.tuner.compat import resolve_quantization_backend
from pacatune.tuner.convolution import Conv
from pacatune.tuner.embedding import Embedding
from pacatune.tuner.experts import is_expert_parameter, is_transposed
from pacatune.tuner.layer import PacaLayer
from pacatune.tuner.linear import Linear
from pacatune.tuner.quantized import QuantizedLinear, dequantized

__all__ = [
    "as_matrix",
    "is_supported",
    "layer_class",
    "supported_kinds",
    "weight_matrix",
]


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


# The weight of a target as a matrix with one column for each that can be trained.


def as_matrix(tensor: Tensor, module: Any, parameter_name: str = "weight") -> Tensor:
    """Rearrange a weight, or its gradient, so that its columns are those of the paper.

    Args:
        tensor: The weight in the module's own layout.
        module: The module of the base model that it belongs to.
        parameter_name: Its name there.

    Returns:
        (O, I) of linear layers, (V, D) of embeddings, (E * O, I) of E experts, and
        (O/G * taps, I) of convolutions: all that leads from an input channel into its group.
    """
    if is_expert_parameter(module, parameter_name):
        experts: Tensor = tensor.transpose(1, 2) if is_transposed(module) else tensor
        return experts.flatten(0, 1)
    if isinstance(module, _ConvNd):
        groups: int = module.groups
        by_group = tensor.unflatten(0, (groups, -1))  # (G, O/G, I/G, *k)
        matrix: Tensor = by_group.movedim((0, 2), (-2, -1)).flatten(-2)
        return matrix.flatten(0, -2)
    return tensor.t() if isinstance(module, Conv1D) else tensor


def weight_matrix(module: Any, parameter_name: str = "weight", **kwargs: Any) -> Tensor:
    """Return the weight of a target as a matrix, dequantised if it is held in few bits.

    Args:
        module: As for `as_matrix`.
        parameter_name: Likewise.
        **kwargs: What PEFT needs to recognise quantised layers.

    Raises:
        ValueError: If the weight is not whole on this process, or cannot be dequantised.
    """
    backend = resolve_quantization_backend(module, **kwargs)
    if backend is not None and not backend.supports_merge:
        raise ValueError(
            f"`selection` looks at the weights, and those of a {type(module).__name__} "
            f"({backend.backend_name}) cannot be dequantised; choose another strategy."
        )
    if backend is not None:
        return dequantized(backend, module, torch.float32)
    weight: Tensor = getattr(module, parameter_name)
    if hasattr(weight, "placements") or hasattr(weight, "ds_shape"):
        raise ValueError(
            f"`selection` looks at the weights, and those of a {type(module).__name__} are "
            "sharded; choose the columns before the model is sharded."
        )
    return as_matrix(weight.detach(), module, parameter_name)
