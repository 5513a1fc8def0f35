"""Convolutions of many kinds and a small network of them, with adapters."""

import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from pacatune import PacaConfig
from pacatune.tuner import PacaLayer
from tests.releases import has

# Input shape without the batch, and a convolution that takes it.
LAYERS = {
    "1d": ((5, 9), lambda: nn.Conv1d(5, 4, 3, stride=2, padding=1)),
    "1d depthwise": ((6, 9), lambda: nn.Conv1d(6, 6, 4, padding=3, groups=6, bias=False)),
    "2d": ((5, 7, 6), lambda: nn.Conv2d(5, 4, 3, padding=1)),
    "2d pointwise": ((5, 7, 6), lambda: nn.Conv2d(5, 4, 1)),
    "2d same": ((5, 7, 6), lambda: nn.Conv2d(5, 4, (2, 3), padding="same", dilation=(1, 2))),
    "2d reflect": ((5, 7, 6), lambda: nn.Conv2d(5, 4, 3, padding=2, padding_mode="reflect")),
    "2d circular": ((6, 7, 6), lambda: nn.Conv2d(6, 4, 3, 2, 1, groups=2, padding_mode="circular")),
    "2d replicate, same": (
        (5, 7, 6),
        lambda: nn.Conv2d(5, 4, (2, 3), padding="same", padding_mode="replicate"),
    ),
    "2d depthwise": ((6, 7, 6), lambda: nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=6)),
    "3d": ((4, 5, 6, 4), lambda: nn.Conv3d(4, 4, (2, 3, 2), padding=1, groups=2)),
}
if has("timm"):
    from timm.layers import Conv2dSame

    LAYERS |= {
        "2d padded by size": (
            (5, 8, 5),
            lambda: Conv2dSame(5, 4, (3, 2), stride=2, dilation=(2, 1)),
        ),
        "2d padded by size, depthwise": ((6, 7, 6), lambda: Conv2dSame(6, 6, 3, 2, groups=6)),
    }


class PadsByInput(nn.Conv2d):
    """Pads by the size of the input, as networks that come from TensorFlow do."""

    def forward(self, x):
        rows, columns = (
            (-size) % step for size, step in zip(x.shape[2:], self.stride, strict=True)
        )
        x = F.pad(x, (0, columns, 0, rows))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardises(nn.Conv2d):
    """Its output is not linear in its weight."""

    def forward(self, x):
        return self._conv_forward(x, F.layer_norm(self.weight, self.weight.shape[1:]), self.bias)


OWN_FORWARDS = {
    "pads by the input": ((6, 7, 6), lambda: PadsByInput(6, 6, 3, stride=2, groups=6)),
    "standardises": ((5, 7, 6), lambda: Standardises(5, 4, 3)),
}
ALL = {**LAYERS, **OWN_FORWARDS}


class Cnn(nn.Module):
    """A small image classifier with depthwise blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "expand": nn.Conv2d(8, 16, 1),
                    "depthwise": nn.Conv2d(16, 16, 3, padding=1, groups=16),
                    "project": nn.Conv2d(16, 8, 1),
                }
            )
            for _ in range(2)
        )
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = F.silu(self.norm(self.stem(x)))
        for block in self.blocks:
            y = F.silu(block["expand"](x))
            x = x + block["project"](F.silu(block["depthwise"](y)))
        return self.head(self.grouped(x).mean((2, 3)))


CNN_TARGETS = ["stem", "expand", "depthwise", "project", "grouped", "head"]


def adapt(base, targets="0", seed=0, **options):
    options = {"r": 2, "paca_alpha": 3, "target_modules": targets, **options}
    model = get_peft_model(base, PacaConfig(**options), autocast_adapter_dtype=False)
    randomise(model, seed)
    return model


def randomise(model, seed=0, adapter="default"):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers(model):
            if adapter in layer.r:
                layer.delta_of(adapter).normal_(std=0.3, generator=generator)


def layers(model):
    return [module for module in model.modules() if isinstance(module, PacaLayer)]
