"""Bases of few bits: quantise one as an adapter's was, and turn one into plain layers again."""

from typing import Any, Literal, cast

import torch
from peft.utils import get_quantization_kwargs
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from pacatune.options import format_quantization
from pacatune.tuner.quantized import QuantizedLinear, dequantized
from pacatune.tuner.quantized_base import Quantization

MergeBase = Literal["original", "dequantized", "nf4"]


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return what transformers needs to quantise a base as an adapter's base was.

    Args:
        quantization: `base_quantization` of the adapter's configuration.
        dtype: To compute in.

    Raises:
        ValueError: If it is not one that bitsandbytes makes while a model loads.
    """
    kind = quantization.get("type")
    is_bitsandbytes = quantization.get("method") == "bitsandbytes"
    if is_bitsandbytes and kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if is_bitsandbytes and kind in ("nf4", "fp4") and quantization.get("block_size") == 64:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=bool(quantization.get("double")),
            bnb_4bit_compute_dtype=dtype,
        )
    raise ValueError(
        f"the adapter's base was quantised as {format_quantization(quantization)!r}, which cannot "
        "be repeated while a model loads; load it with transformers, then the adapter with "
        "PeftModel.from_pretrained, and use those."
    )


@torch.no_grad()
def replace_quantised(model: PreTrainedModel, original: nn.Module | None) -> None:
    """Replace every quantised layer by a plain one, in place; adapters stay where they are.

    Args:
        model: The base inside a PEFT model.
        original: The same base, not quantised: its weights are taken, but for the adapted columns,
            which were trained from the quantised ones. None: all weights are the quantised ones,
            dequantised.
    """
    options = get_quantization_kwargs(model)
    layers = {id(m.base_layer): m for m in model.modules() if isinstance(m, QuantizedLinear)}
    for name, module in list(model.named_modules()):
        backend = resolve_quantization_backend(module, **options)
        if backend is None:
            continue
        weight = dequantized(backend, module, model.dtype)
        if original is not None:
            columns = weight
            weight = _weight_of(original, name).to(weight).clone()
            if (layer := layers.get(id(module))) is not None:
                for indices in layer.paca_indices.values():
                    weight.index_copy_(1, indices, columns.index_select(1, indices))
        plain = _linear(weight, cast(Any, module).bias)
        if (layer := layers.get(id(module))) is not None:
            layer.base_layer, layer.quantization_backend = plain, None
        else:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
    _forget_quantisation(model)


def _weight_of(original: nn.Module, name: str) -> Tensor:
    return cast(Tensor, original.get_submodule(name.replace(".base_layer", "")).weight).detach()


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out_features, in_features = weight.shape
    plain = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(weight), requires_grad=False)
    return plain


def _forget_quantisation(model: Any) -> None:
    """Let transformers save the model as one that was never quantised."""
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        if hasattr(model, name):
            setattr(model, name, False)
    for holder, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(holder, name):
            delattr(holder, name)
