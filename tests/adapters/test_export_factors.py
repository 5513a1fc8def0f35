"""Convolutions as LoRA: exact where PEFT's can say it, refused where it cannot."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import nn

from pacatune.adapters.export_factors import convolution_factors, refuse_inexpressible
from pacatune.ops.columns import put_columns_, read_columns
from pacatune.tuner.layout import layout_of

CONVOLUTIONS = {
    "wide": ((5, 7, 6), lambda: nn.Conv2d(5, 40, 3, stride=2, padding=1)),  # taps
    "narrow": ((5, 7, 6), lambda: nn.Conv2d(5, 4, 3, padding="same")),  # outputs
    "1d": ((5, 9), lambda: nn.Conv1d(5, 16, 3, padding=2)),
    "groups, wide": ((6, 7, 6), lambda: nn.Conv2d(6, 60, (1, 3), groups=3)),
    "groups, narrow": ((6, 7, 6), lambda: nn.Conv2d(6, 6, 3, groups=2)),
    "depthwise": ((6, 7, 6), lambda: nn.Conv2d(6, 12, 3, groups=6)),
    "3d": ((4, 5, 6, 4), lambda: nn.Conv3d(4, 6, 2)),
    "pointwise, dilated in name": ((5, 7, 6), lambda: nn.Conv2d(5, 8, 1, dilation=2)),
    "padded by nothing": ((5, 7, 6), lambda: nn.Conv2d(5, 8, 3, padding_mode="reflect")),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd:UserWarning")
def test_factors_are_exact_in_pefts_lora(name):
    """PEFT builds the layer, so what it has no place for would not load."""
    torch.manual_seed(0)
    shape, build = CONVOLUTIONS[name]
    base = build().double()
    x = torch.randn(2, *shape, dtype=torch.float64)
    refuse_inexpressible(base, "layer")
    out_per_group, in_channels, *kernel = layout_of(base).file_shape
    delta = torch.randn(out_per_group, 3, *kernel, dtype=torch.float64)
    indices = torch.tensor([0, 1, in_channels - 1])
    factor_a, factor_b = convolution_factors(delta, indices, in_channels, base.groups)
    most = int((indices // (in_channels // base.groups)).bincount().max())
    assert len(factor_a) == base.groups * min(out_per_group, most * math.prod(kernel))
    weight = base.weight.detach().clone()
    put_columns_(weight, indices, read_columns(weight, indices, base.groups) + delta, base.groups)
    config = LoraConfig(r=len(factor_a), lora_alpha=len(factor_a), target_modules=["0"])
    lora = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)
    keys = {"A": factor_a, "B": factor_b}
    tensors = {f"base_model.model.0.lora_{key}.weight": value for key, value in keys.items()}
    assert not set_peft_model_state_dict(lora, tensors).unexpected_keys
    with torch.no_grad():
        expected = torch.func.functional_call(base, {"weight": weight}, x)
        torch.testing.assert_close(lora(x), expected, atol=1e-12, rtol=1e-12)


class Own(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        (nn.Conv2d(3, 4, 3, dilation=2), r"dilation = \(2, 2\)"),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "padding_mode = 'reflect'"),
        (Own(3, 4, 3), r"a forward of its own \(Own\)"),
    ],
)
def test_what_lora_does_not_follow_is_refused(layer, problem):
    with pytest.raises(ValueError, match=rf"here is a convolution with {problem}.*merge the"):
        refuse_inexpressible(layer, "here")
