"""Steps of the paper's image models at their real size, with random weights: time and bytes kept.

Neither depends on the values of weights. BatchNorm is in evaluation mode, as in `train-image`.
"""

import copy
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pacatune.methods import METHODS, Method

if TYPE_CHECKING:
    from pacatune.measure.methods import Contender

NUM_CLASSES = 100
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
    """Let methods, ours first, take turns at training steps in float32.

    Returns `saved_bytes` of a whole step by method, and `ratios`, ours over the others.
    """
    from pacatune.measure.methods import adapt
    from pacatune.measure.timing import alternate, compare

    torch.manual_seed(seed)
    base = with_statistics(build())
    batch = make_batch(num_images, image_size, torch.float32, seed)
    steps, saved = {}, {}
    for method in methods:
        targets, heads = choose_layers(base, METHODS[method], rank)
        contender = adapt(
            copy.deepcopy(base),
            method,
            rank=rank,
            dropout=0.0,
            seed=seed,
            targets=targets,
            heads=heads,
        )
        steps[method] = make_step(contender, *batch)
        saved[method] = _count(contender.model, *batch)
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


def with_statistics(model: nn.Module, size: int = _STATISTICS_SIZE) -> nn.Module:
    """Give BatchNorm the statistics of random images, or values would vanish in depth."""
    norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    if norms:
        momenta = [layer.momentum for layer in norms]
        for layer in norms:
            layer.momentum = None  # the plain mean over batches, of which there is one
        size = min(size, _STATISTICS_SIZE)
        with torch.no_grad():
            model.train()(pixel_values=torch.randn(_STATISTICS_BATCH, 3, size, size))
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.momentum = momentum
    return model


def make_batch(num_images: int, size: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Return (B, 3, size, size) random images and (B,) classes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, 3, size, size, generator=generator)
    labels = torch.randint(NUM_CLASSES, (num_images,), generator=generator)
    return images.to(dtype), labels


def choose_layers(model: nn.Module, row: Method, rank: int) -> tuple[set[str] | str, list[str]]:
    """Return what `pacatune train-image` adapts by default, and the heads that it trains."""
    from pacatune.training.image.model import choose_targets, find_heads

    return (choose_targets(model, row, rank)[0] if row.has_adapter else ""), find_heads(model)


def make_step(contender: "Contender", images: Tensor, labels: Tensor) -> Callable[[], float]:
    """Return a function that makes one optimizer step, BatchNorm frozen, and returns its seconds.

    `images` are (B, 3, H, W), `labels` (B,).
    """
    model, optimizer = contender.model, contender.optimizer
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()

    def step() -> float:
        start = time.perf_counter()
        _loss(model, images, labels).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(pixel_values=images).logits.float(), labels)


def _count(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    from pacatune.measure.counters import SavedBytes

    with SavedBytes(model) as saved:
        loss = _loss(model, images, labels)
    del loss
    return saved.num_bytes
