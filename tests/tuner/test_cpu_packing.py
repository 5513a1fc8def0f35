"""bitsandbytes' reordering of 4-bit weights for AVX-512 CPUs, by its own functions on any CPU."""

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from bitsandbytes.nn import Linear4bit
from peft import get_peft_model
from torch import nn

from pacatune import PacaConfig
from pacatune.tuner.quantized import dequantized, forbid_packing
from tests.tuner.quantizers import quantise


class Backend:
    backend_name = "bnb 4bit"


def weight_of(layer):
    return dequantized(Backend, layer, torch.float32)


def pack_(layer):
    """What the first evaluation does."""
    layer.support_avx512bf16_for_cpu = True
    layer.weight.data, _ = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )


@pytest.fixture(params=["bitsandbytes-nf4", "bitsandbytes-fp4-double"])
def net(request):
    torch.manual_seed(0)
    layers = (quantise(nn.Linear(128, 64), request.param) for _ in range(2))
    return nn.ModuleDict(dict(zip(("first", "second"), layers, strict=True)))


def test_packed_weights_are_put_back(net):
    layer = net["first"]
    before = weight_of(layer)
    pack_(layer)
    assert layer.weight.shape == (64, 64)
    forbid_packing(net)
    assert layer.support_avx512bf16_for_cpu is False
    # What the scales lost to bfloat16 while they were packed is gone; nested ones lose once more.
    torch.testing.assert_close(weight_of(layer), before, rtol=2**-7, atol=1e-3)


def test_whole_model_keeps_its_weights_from_adapting_on(net):
    """Layers beside the adapted one as well: else an evaluation would change them."""
    for layer in net.values():
        layer.support_avx512bf16_for_cpu = True
    before = {name: weight_of(layer) for name, layer in net.items()}
    model = get_peft_model(net, PacaConfig(r=4, target_modules=["first"]))
    x = torch.randn(3, 128)
    with torch.no_grad():
        model.eval().base_model.model["second"](x)
        model.base_model.model["first"](x)
    net = model.unload()
    for name, layer in net.items():
        assert type(layer) is Linear4bit
        assert torch.equal(weight_of(layer), before[name])
