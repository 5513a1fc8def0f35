"""Small images whose classes can be learned, and tiny models to learn them."""

import numpy as np
import torch
from PIL import Image


def write_images(folder, num_per_class):
    """Write a folder per colour with noisy PNG files of it."""
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir(parents=True)
        for number in range(num_per_class):
            pixels = rng.integers(0, 140, (36, 40, 3)).astype(np.uint8)
            pixels[..., channel] += 90
            Image.fromarray(pixels).save(folder / name / f"{number:02}.png")


def save_vit(folder):
    """Write a random ViT of two layers, with its transform, as from a hub."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
        "hidden_dropout_prob": 0.1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTForImageClassification(ViTConfig(**settings)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def save_timm(folder):
    """Write a random timm model as transformers does, with BatchNorm that has seen some data."""
    import timm
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    architecture = "test_efficientnet"
    description = timm.get_pretrained_cfg(architecture).to_dict()
    values = {"architecture": architecture, "num_classes": 1000, "pretrained_cfg": description}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TimmWrapperForImageClassification(TimmWrapperConfig.from_dict(values)).train()
        model(torch.randn(4, 3, 64, 64))
    model.eval().save_pretrained(folder)
