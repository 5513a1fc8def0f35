"""Weights stored input first, as wide as high: only values tell a wrong orientation."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from pacatune import PacaConfig
from pacatune.ops.reference import adapted_experts, adapted_weight
from tests.tuner import moe

SIZE = 12


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Conv1D(SIZE, SIZE)

    def forward(self, x):
        return self.layer(x)


def test_conv1d():
    torch.manual_seed(0)
    plain = Net().double()
    config = PacaConfig(r=3, paca_alpha=6, target_modules=["layer"], init_weights=False)
    model = get_peft_model(copy.deepcopy(plain), config, autocast_adapter_dtype=False)
    layer = model.base_model.model.layer
    weight = plain.layer.weight.detach().t()
    adapted = adapted_weight(weight, layer.delta_of("default"), layer.paca_indices["default"], 2.0)
    x = torch.randn(5, SIZE, dtype=torch.float64)
    expected = x @ adapted.detach().t() + plain.layer.bias
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(layer.get_delta_weight("default").t(), (adapted - weight).detach())
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, plain.layer.weight)


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4"])
def test_experts(kind):
    base = moe.build(kind, intermediate_size=16)  # the hidden size
    model = moe.adapt(base)
    moe.assert_equal(model, moe.Reference(base, model), moe.ids())
    model.merge_adapter()
    for name, layer in moe.layers(model).items():
        weight = base.get_parameter(name).detach()
        update = layer.delta_of("default"), layer.paca_indices["default"], layer.scaling["default"]
        expected = adapted_experts(weight, *update, is_transposed=True)
        torch.testing.assert_close(layer.get_base_weight(), expected.detach())
