"""The image models of the benchmarks, with random weights: those of the paper's Tables 6 and 7."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.methods import RANK
from pacatune.bench.methods import Contender
from pacatune.methods import METHODS
from pacatune.training.image.parts import find_heads
from pacatune.training.image.targets import choose_targets

__all__ = [
    "MODELS",
    "ImageModel",
    "adapted_layers",
    "choose_layers",
    "make_batch",
    "make_model",
    "make_step",
    "positions_of",
]

NUM_CLASSES = 100
_VIT, _EFFICIENTNET = "vit-b16", "efficientnetv2-l"
# Enough to put random layers' outputs into the range of trained ones.
_STATISTICS_BATCH, _STATISTICS_SIZE = 4, 128


@dataclass(frozen=True, kw_only=True)
class ImageModel:
    """What is measured of a model."""

    title: str
    build: Callable[[], nn.Module]
    """On the default device, with random weights."""
    methods: tuple[str, ...]
    image_size: int
    """Of the images whose steps are timed."""
    batch_size: int
    """Images of a step."""
    counted_size: int
    """Of the images for which the bytes kept are counted: that of real training."""
    step_targets: dict[str, float] = field(default_factory=dict)
    """Other method -> the highest acceptable ratio of paca's step to its step."""
    byte_targets: dict[str, float] = field(default_factory=dict)
    """The same for the bytes kept for backward."""


def _build_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(num_labels=NUM_CLASSES)
    model = ViTForImageClassification._from_config(config, attn_implementation="sdpa")
    # As the embeddings of the benchmarks' Llama do, in all methods: see `frozen`.
    model.vit.embeddings.register_forward_hook(_ask_for_gradient)
    return model  # type: ignore[no-any-return]


def _ask_for_gradient(module: nn.Module, args: Any, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()


def _build_efficientnet() -> nn.Module:
    from transformers import AutoModelForImageClassification, TimmWrapperConfig

    config = TimmWrapperConfig.from_dict(
        {"architecture": "tf_efficientnetv2_l", "num_classes": NUM_CLASSES}
    )
    return AutoModelForImageClassification.from_config(config)  # type: ignore[no-any-return]


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
        build=_build_efficientnet,
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
        seed: Of weights and images.
    """
    torch.manual_seed(seed)
    built = model.build()
    norms = [layer for layer in built.modules() if isinstance(layer, _BatchNorm)]
    if norms:
        momenta = [layer.momentum for layer in norms]
        for layer in norms:
            layer.momentum = None  # the plain mean over batches, of which there is one
        size = min(model.image_size, _STATISTICS_SIZE)
        with torch.no_grad():
            built.train()(pixel_values=torch.randn(_STATISTICS_BATCH, 3, size, size))
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.momentum = momentum
    return built


def make_batch(num_images: int, size: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Return (B, 3, size, size) random images and (B,) classes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, 3, size, size, generator=generator)
    labels = torch.randint(NUM_CLASSES, (num_images,), generator=generator)
    return images.to(dtype), labels


def choose_layers(model: nn.Module, method: str) -> tuple[set[str] | str, list[str]]:
    """Return what `pacatune train-image` adapts by default, and the heads that it trains.

    Args:
        model: Not adapted.
        method: `lora...` cannot adapt all layers that PaCA can.
    """
    heads = find_heads(model)
    row = METHODS["lora" if method.startswith("lora") else "paca"]
    return choose_targets(model, row, RANK, heads)[0], heads


def make_step(contender: Contender, images: Tensor, labels: Tensor) -> Callable[[], float]:
    """Return a function that makes one optimizer step and returns its seconds.

    Args:
        contender: Model and optimizer; its BatchNorm is put into evaluation mode.
        images: (B, 3, H, W).
        labels: (B,).
    """
    model, optimizer = contender.model, contender.optimizer
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()

    def step() -> float:
        start = time.perf_counter()
        F.cross_entropy(model(pixel_values=images).logits.float(), labels).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - start

    return step


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
