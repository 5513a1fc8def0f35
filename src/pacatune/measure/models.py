"""The model that is simulated: its configuration, and its modules without weights.

Everything is found out from the configuration; no code that comes with a model is ever executed.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from pacatune import pretrained
from pacatune.measure.presets import PRESETS
from pacatune.names import guess
from pacatune.pretrained import bitsandbytes_config, check_quantizable, empty_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


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


def is_4bit(module: nn.Module) -> bool:
    """Whether a module is one of bitsandbytes' 4-bit layers."""
    kind = type(module)
    return kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes.")


def checkpoint_blocks(model: Any) -> None:
    """Let each block keep its inputs only."""
    # Renamed within version 5 of transformers.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
