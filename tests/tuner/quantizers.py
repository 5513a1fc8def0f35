"""Real quantised linear layers, by every method that runs on a CPU."""

import copy
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn

from pacatune.tuner.quantized import forbid_packing


def _bitsandbytes_4bit(linear, **options):
    layer = import_module("bitsandbytes").nn.Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None, **options
    )
    layer.load_state_dict(linear.state_dict())
    forbid_packing(layer)  # the tests evaluate the base first, and not all sizes can be packed
    return layer.to("cpu")


def _nf4(linear):
    return _bitsandbytes_4bit(linear, quant_type="nf4", compute_dtype=linear.weight.dtype)


def _fp4_double(linear):
    return _bitsandbytes_4bit(linear, quant_type="fp4", compress_statistics=True)


def _bitsandbytes_8bit(linear):
    layer = import_module("bitsandbytes").nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        has_fp16_weights=False,
        threshold=6.0,
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def _torchao(linear, config):
    quantization = import_module("torchao.quantization")
    quantization.quantize_(linear, config(quantization))
    return linear


def _torchao_int8(linear):
    return _torchao(linear, lambda ao: ao.Int8WeightOnlyConfig())


def _torchao_int4(linear):
    return _torchao(
        linear,
        lambda ao: ao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=ao.granularity.PerGroup(32)
        ),
    )


def _hqq(linear):
    core = import_module("hqq.core.quantize")
    config = core.BaseQuantizeConfig(nbits=4, group_size=32)
    return core.HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")


_ALL = {
    "bitsandbytes-nf4": _nf4,
    "bitsandbytes-fp4-double": _fp4_double,
    "bitsandbytes-int8": _bitsandbytes_8bit,
    "torchao-int8": _torchao_int8,
    "torchao-int4": _torchao_int4,
    "hqq-int4": _hqq,
}
# Those that are installed: bitsandbytes; the others in test_quantizers_apart.py alone.
QUANTIZERS = {name: make for name, make in _ALL.items() if find_spec(name.partition("-")[0])}


def quantise(linear: nn.Linear, name: str) -> nn.Module:
    return QUANTIZERS[name](copy.deepcopy(linear)).requires_grad_(False)
