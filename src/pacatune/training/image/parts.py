"""The parts of an image model by role: heads and BatchNorm."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def find_heads(model: Any) -> list[str]:
    """Return the names of the modules that turn features into classes.

    Args:
        model: An image classifier of transformers, timm's inside its wrapper.

    Raises:
        ValueError: If there is none.
    """
    timm_model = getattr(model, "timm_model", None)
    if timm_model is None:
        body = getattr(model, model.base_model_prefix, None)
        children = list(model.named_children())
        heads = [name for name, child in children if child is not body and _has_weights(child)]
    else:
        found = timm_model.get_classifier()
        wanted = set(found if isinstance(found, tuple) else (found,))
        heads = [n for n, child in model.named_modules() if child in wanted and _has_weights(child)]
    if not heads:
        raise ValueError(
            f"{type(model).__name__} has no classifier of its own to train; use another model."
        )
    return heads


def reset_heads(model: nn.Module, heads: list[str]) -> None:
    """Give the heads new random weights, by torch's own rule for each kind of layer."""
    for name in heads:
        for module in model.get_submodule(name).modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()


def find_batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the BatchNorm layers by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
