"""The model that is simulated: its configuration, and its modules without weights.

Everything is found out from the configuration; no code that comes with a model is ever executed.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from pacatune import pretrained
from pacatune.files.journal import is_gguf
from pacatune.grid.loading import formats_in, pack_empty
from pacatune.measure.presets import PRESETS
from pacatune.names import guess
from pacatune.pretrained import bitsandbytes_config, check_quantizable, empty_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from pacatune.measure.setting import Setting


def load_config(model: str) -> "PreTrainedConfig":
    """Return the configuration of a model.

    `model` is a name of `PRESETS`, a config.json, a folder that holds one, or a hub id, of which
    nothing but config.json is downloaded.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if model in PRESETS:
        return cast("PreTrainedConfig", AutoConfig.for_model(**PRESETS[model].values))
    file = Path(model).expanduser()
    if not file.exists() and "/" not in model:
        hint = guess(model.lower(), PRESETS, cutoff=0.4) or "none is like it. "
        raise ValueError(
            f"unknown model {model!r}; {hint}Known are {', '.join(PRESETS)}, and any config.json, "
            "model folder or hub id."
        )
    try:
        if is_gguf(file):
            return cast("PreTrainedConfig", pretrained.load_config(str(file), option="model"))
        if file.is_file():
            with pretrained.explained(model):
                config = AutoConfig.from_pretrained(file, trust_remote_code=False)
        else:
            config = pretrained.load_config(model, option="model")
    except StrictDataclassError as error:
        raise ValueError(f"model {model}: transformers refuses its config.json: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"model {model} is saved quantised; give the configuration of the original model, and "
            "choose the quantisation here."
        )
    return config


def make_skeleton(config: "PreTrainedConfig", name: str, dtype: torch.dtype) -> "PreTrainedModel":
    """Return the model without weights, on the meta device; `name` is for messages."""
    from transformers import AutoModelForCausalLM

    try:
        model: PreTrainedModel = empty_model(
            AutoModelForCausalLM, config, dtype=dtype, attn_implementation="sdpa"
        )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"model {name}: {config.model_type!r} is no causal language model; choose one that is."
        ) from error
    return model


def quantize_(model: Any, quantization: str, dtype: torch.dtype) -> None:
    """Put bitsandbytes' 4-bit layers in place of every linear layer but the head, without weights.

    The model is on the meta device; `dtype` is that of the products.
    """
    check_quantizable(quantization, model.config, "the model", option="quantization")
    from transformers.integrations import replace_with_bnb_linear

    from pacatune.tuner.quantized import forbid_packing

    head = model.get_output_embeddings()
    config = bitsandbytes_config(quantization, dtype)
    left = [name for name, module in model.named_modules() if module is head]
    replace_with_bnb_linear(model, modules_to_not_convert=left, quantization_config=config)
    forbid_packing(model)
    model.is_loaded_in_4bit = model.is_quantized = True


def pack_(model: Any, setting: "Setting") -> None:
    """Keep weights in the blocks of a GGUF file: of one that is there, or of a usual mix."""
    if is_gguf(setting.model):
        if setting.quantization is not None:
            raise ValueError(
                f"`quantization` ({setting.quantization!r}) with a GGUF file: its weights stay as "
                "they are there; drop the option."
            )
        format_of: Callable[[str], str | None] = formats_in(model, setting.model).get
    else:
        assert setting.quantization is not None
        format_of = partial(_format_of, setting.quantization.upper(), model)
    pack_empty(model, format_of, setting.weight_dtype)


def _format_of(kind: str, model: Any, name: str) -> str:
    """Return the format that llama.cpp's llama-quantize gives a layer (src/llama-quant.cpp)."""
    layer = model.get_submodule(name)
    is_head = layer is model.get_output_embeddings()
    is_head |= model.config.tie_word_embeddings and layer is model.get_input_embeddings()
    if kind == "Q8_0" or (not is_head and kind != "Q4_K_M"):
        return kind
    number, num_layers = re.search(r"\.(\d+)\.", name), model.config.num_hidden_layers
    if number is not None and name.endswith(("v_proj", "down_proj")):
        place, eighth = int(number[1]), num_layers // 8
        is_end = place < eighth or place >= 7 * num_layers // 8
        if is_end or (place - eighth) % 3 == 2:
            return "Q6_K"
    if name.endswith("qkv_proj"):
        return "Q5_K"
    return "Q6_K" if is_head else "Q4_K"


def is_4bit(module: nn.Module) -> bool:
    """Whether a module is one of bitsandbytes' 4-bit layers."""
    kind = type(module)
    return kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes.")


def checkpoint_blocks(model: Any) -> None:
    """Let each block keep its inputs only."""
    # Renamed within version 5 of transformers.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
