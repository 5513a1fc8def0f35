"""Steps of the paper's image models at their real size, with random weights: time and bytes kept.

Neither depends on the values of weights. BatchNorm is in evaluation mode, as in `train-image`.
"""

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pacatune.methods import METHODS, adapter_config, size_options

__all__ = ["NUM_CLASSES", "build_efficientnet", "build_vit", "measure_steps"]

NUM_CLASSES = 100
_RATE = 1e-4
# Enough to put random layers' outputs into the range of trained ones.
_STATISTICS_BATCH, _STATISTICS_SIZE = 4, 128


def build_vit(**sizes: Any) -> nn.Module:
    """Return ViT-B/16, unless sizes are given, with random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(num_labels=NUM_CLASSES, **sizes)
    return ViTForImageClassification._from_config(config, attn_implementation="sdpa")  # type: ignore[no-any-return]


def build_efficientnet(architecture: str = "tf_efficientnetv2_l") -> nn.Module:
    """Return EfficientNetV2-L, unless another architecture of timm is given."""
    from transformers import AutoModelForImageClassification, TimmWrapperConfig

    config = TimmWrapperConfig.from_dict({"architecture": architecture, "num_classes": NUM_CLASSES})
    return AutoModelForImageClassification.from_config(config)  # type: ignore[no-any-return]


def measure_steps(
    build: Callable[[], nn.Module],
    methods: tuple[str, ...],
    *,
    rank: int,
    num_images: int,
    image_size: int,
    seconds: float,
    seed: int = 0,
) -> dict[str, Any]:
    """Let methods take turns at training steps in float32.

    Args:
        build: Returns the model.
        methods: paca first, then lora or full.
        rank: Rank of the adapters.
        num_images: Images in a step.
        image_size: Width and height of the images, in pixels.
        seconds: For all steps.
        seed: Seed for weights, images, columns and LoRA.

    Returns:
        `saved_bytes` by method, for a whole step; `ratios`, ours over the others, with intervals.
    """
    from pacatune.bench.timing import alternate, compare

    torch.manual_seed(seed)
    base = _with_statistics(build())
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, 3, image_size, image_size, generator=generator)
    labels = torch.randint(NUM_CLASSES, (num_images,), generator=generator)
    models = {method: _adapt(copy.deepcopy(base), method, rank, seed) for method in methods}
    saved = {method: _count(model, images, labels) for method, model in models.items()}
    steps = {method: _make_step(model, images, labels) for method, model in models.items()}
    times = alternate(steps, seconds=seconds, min_rounds=5, num_warmup=1)
    ours, *others = methods
    return {
        "saved_bytes": saved,
        "step_ms": {m: 1e3 * sorted(t)[len(t) // 2] for m, t in times.items()},
        "num_rounds": len(times[ours]),
        "ratios": [
            {"method": ours, "reference": other, **compare(times[ours], times[other], seed=seed)}
            for other in others
        ],
    }


def _with_statistics(model: nn.Module) -> nn.Module:
    """Give BatchNorm the statistics of random images, or values would vanish in depth."""
    norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    if norms:
        momenta = [layer.momentum for layer in norms]
        for layer in norms:
            layer.momentum = None  # the plain mean over batches, of which there is one
        size = _STATISTICS_SIZE
        with torch.no_grad():
            model.train()(pixel_values=torch.randn(_STATISTICS_BATCH, 3, size, size))
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.momentum = momentum
    return model


def _adapt(model: nn.Module, method: str, rank: int, seed: int) -> nn.Module:
    from pacatune.training.image.parts import find_heads

    torch.manual_seed(seed)
    if METHODS[method].has_adapter:
        model = _with_adapter(model, method, rank, seed, find_heads(model))
    model.train()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()
    return model


def _with_adapter(
    model: nn.Module, method: str, rank: int, seed: int, heads: list[str]
) -> nn.Module:
    from peft import get_peft_model

    from pacatune.training.image.targets import choose_targets

    row = METHODS[method]
    options = size_options(row, rank, rank)
    if row.is_paca:
        options["random_seed"] = seed
    targets = choose_targets(model, row, rank, heads)[0]
    config = adapter_config(row, **options, target_modules=targets, modules_to_save=heads)
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(pixel_values=images).logits.float(), labels)


def _count(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    from pacatune.memory import SavedBytes

    with SavedBytes(model) as saved:
        loss = _loss(model, images, labels)
    del loss
    return saved.num_bytes


def _make_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_RATE, fused=True)

    def step() -> float:
        start = time.perf_counter()
        _loss(model, images, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step
