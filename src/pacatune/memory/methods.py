"""What each method makes of a model without weights: PEFT's adapters, bitsandbytes' layers."""

from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn

from pacatune.installation import install_command
from pacatune.memory.setting import Setting
from pacatune.methods import adapter_config, size_options

__all__ = ["adapt", "is_quantized", "quantize_", "quantized_weight"]

# bitsandbytes' own numbers: values per scale, and scales per scale of those.
_BLOCK, _NESTED_BLOCK = 64, 256


def adapt(model: nn.Module, setting: Setting) -> nn.Module:
    """Put the method's adapter on a model of the meta device; every weight is trained without one.

    All methods adapt the linear layers of the blocks, as `pacatune train` does by default.

    Args:
        model: Changed in place.
        setting: Method, rank, dropout and targets.
    """
    if not setting.row.has_adapter:
        return model.requires_grad_(True)
    from peft import get_peft_model

    from pacatune.tuner.defaults import default_targets

    targets = list(setting.target_modules) or default_targets(model)
    options = size_options(setting.row, setting.rank, setting.rank, setting.dropout)
    config = adapter_config(setting.row, **options, task_type="CAUSAL_LM", target_modules=targets)
    adapted: nn.Module = get_peft_model(cast(Any, model), config, low_cpu_mem_usage=True)
    return adapted


def quantize_(model: Any, setting: Setting) -> None:
    """Put bitsandbytes' 4-bit layers in place of every linear layer but the head, without weights.

    Raises:
        ValueError: If bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"`quantization` ({setting.quantization!r}) needs bitsandbytes; "
            f"{install_command('quant')}."
        )
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear

    from pacatune.tuner.quantized import forbid_packing

    head = model.get_output_embeddings()
    left = [name for name, module in model.named_modules() if module is head]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=setting.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=setting.compute_dtype,
    )
    replace_with_bnb_linear(model, modules_to_not_convert=left, quantization_config=config)
    forbid_packing(model)
    model.is_loaded_in_4bit = True
    with torch.device("meta"):
        for module in model.modules():
            if is_quantized(module):
                module.weight, _ = quantized_weight(module, setting)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is one of bitsandbytes' 4-bit layers."""
    kind = type(module)
    return kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes.")


def quantized_weight(layer: Any, setting: Setting) -> tuple[Tensor, list[Tensor]]:
    """Return an empty packed weight of a 4-bit layer, and the tensors of scales that belong to it.

    Two values are a byte; each 64 have a scale of one byte, each 256 scales one of four bytes.

    Args:
        layer: Its `in_features` and `out_features` are read.
        setting: Kind of quantisation and dtype.
    """
    from bitsandbytes.functional import QuantState

    shape = torch.Size((layer.out_features, layer.in_features))
    num_scales = -(-shape.numel() // _BLOCK)
    packed: Any = nn.Parameter(
        torch.empty((shape.numel() + 1) // 2, 1, dtype=torch.uint8), requires_grad=False
    )
    scales = torch.empty(num_scales, dtype=torch.uint8)
    outer = torch.empty(-(-num_scales // _NESTED_BLOCK))
    code, codes_of_scales, offset = torch.empty(16), torch.empty(256), torch.empty(())
    packed.quant_type, packed.compress_statistics = setting.quantization, True
    packed.quant_state = QuantState(
        absmax=scales,
        shape=shape,
        code=code,
        blocksize=_BLOCK,
        quant_type=setting.quantization,
        dtype=setting.compute_dtype,
        offset=offset,
        state2=QuantState(
            absmax=outer, code=codes_of_scales, blocksize=_NESTED_BLOCK, dtype=torch.float32
        ),
    )
    return packed, [scales, outer, code, codes_of_scales, offset]
