"""Steps of image models: real ones of small sizes, counted and timed in turns."""

from functools import partial

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from pacatune.experiments.reproduce import image_steps
from pacatune.experiments.reproduce.image_steps import build_efficientnet, build_vit, measure_steps
from pacatune.measure.counters import SavedBytes

VIT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}


def measure(build, methods, image_size=32):
    return measure_steps(build, methods, rank=4, num_images=2, image_size=image_size, seconds=0.0)


def test_paca_keeps_less_than_lora():
    result = measure(partial(build_vit, **VIT), ("paca", "lora"))
    assert result["saved_bytes"]["paca"] < result["saved_bytes"]["lora"]
    (ratio,) = result["ratios"]
    assert (ratio["method"], ratio["reference"]) == ("paca", "lora")
    assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
    assert result["num_rounds"] == 5


def test_bytes_are_those_of_the_plain_step():
    """Full training, counted here once more on the model itself."""
    result = measure(partial(build_vit, **VIT), ("paca", "full"))
    torch.manual_seed(0)
    model = build_vit(**VIT).train()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    labels = torch.randint(image_steps.NUM_CLASSES, (2,), generator=generator)
    with SavedBytes(model) as saved:
        loss = torch.nn.functional.cross_entropy(model(pixel_values=images).logits, labels)
    assert result["saved_bytes"]["full"] == saved.num_bytes
    del loss


def test_batch_norm_stays_in_evaluation_mode(monkeypatch):
    pytest.importorskip("timm")
    seen = []
    original = image_steps.make_step

    def look(contender, images, labels):
        step = original(contender, images, labels)
        norms = [layer for layer in contender.model.modules() if isinstance(layer, _BatchNorm)]
        seen.append((len(norms), any(layer.training for layer in norms)))
        return step

    monkeypatch.setattr(image_steps, "make_step", look)
    result = measure(partial(build_efficientnet, "mobilenetv3_small_050"), ("paca", "full"), 64)
    assert [training for _, training in seen] == [False, False]
    assert all(number > 5 for number, _ in seen)
    assert result["saved_bytes"]["paca"] < result["saved_bytes"]["full"]
