"""The image models of the benchmarks, with random weights: those of the paper's Tables 6 and 7."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from pacatune.experiments.reproduce.image_steps import (
    build_efficientnet,
    build_vit,
    with_statistics,
)

__all__ = ["MODELS", "ImageModel", "adapted_layers", "make_model", "positions_of"]

_VIT, _EFFICIENTNET = "vit-b16", "efficientnetv2-l"


@dataclass(frozen=True, kw_only=True)
class ImageModel:
    """What is measured of a model."""

    title: str
    build: Callable[[], nn.Module]
    """On the default device, with random weights."""
    methods: tuple[str, ...]
    image_size: int
    """Height and width of the images whose steps are timed."""
    batch_size: int
    """Images of a step."""
    counted_size: int
    """Height and width for which the bytes kept are counted: those of real training."""
    step_targets: dict[str, float] = field(default_factory=dict)
    """Other method -> the highest acceptable ratio of paca's step to its step."""
    byte_targets: dict[str, float] = field(default_factory=dict)
    """The same for the bytes kept for backward."""


def _build_vit() -> nn.Module:
    model: Any = build_vit()
    # As the embeddings of the benchmarks' Llama do, in all methods: see `frozen`.
    model.vit.embeddings.register_forward_hook(_ask_for_gradient)
    return cast(nn.Module, model)


def _ask_for_gradient(module: nn.Module, args: Any, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()


MODELS = {
    _VIT: ImageModel(
        title="ViT-B/16 with random weights",
        build=_build_vit,
        methods=("frozen", "paca", "lora", "lora_r4", "lora_dropout", "full"),
        image_size=224,
        batch_size=4,
        counted_size=224,
        step_targets={"lora": 0.75},
        byte_targets={"lora": 0.65},
    ),
    _EFFICIENTNET: ImageModel(
        title="EfficientNetV2-L with random weights, BatchNorm in evaluation mode",
        build=build_efficientnet,
        methods=("paca", "paca_lean", "lora", "lora_lean", "full", "head"),
        image_size=192,
        batch_size=2,
        counted_size=384,
        step_targets={"full": 0.88},
        byte_targets={"full": 0.80},
    ),
}


def make_model(model: ImageModel, seed: int) -> nn.Module:
    """Return the model in float32, its BatchNorm with the statistics of random images.

    With those of a fresh model, values would grow or vanish from layer to layer.

    Args:
        model: Which one.
        seed: Seed of weights and images.
    """
    torch.manual_seed(seed)
    return with_statistics(model.build(), model.image_size)


def adapted_layers(model: nn.Module) -> dict[nn.Module, str]:
    """Map each layer that an adapter is on to its kind, such as `conv_pw`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        module: name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def positions_of(layers: dict[nn.Module, str], run: Callable[[], Any]) -> dict[nn.Module, int]:
    """Return how many tokens, or positions of all images, each of our layers sees in `run`."""
    found: dict[nn.Module, int] = {}

    def look(layer: Any, args: tuple[Tensor, ...]) -> None:
        x, channels = args[0], -1
        if hasattr(layer, "_padded"):  # a convolution
            x, channels = layer._padded(x)[0], 1
        found[layer] = x.numel() // x.shape[channels]

    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found
