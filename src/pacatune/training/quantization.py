"""Holding the frozen weights in 4 or 8 bits while training (QPaCA, QLoRA)."""

import logging
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from pacatune.installation import install_command

if TYPE_CHECKING:
    from pacatune.training.config import RunConfig


def check_quantization(config: "RunConfig", model_config: Any) -> None:
    """Refuse a quantisation that the method, the model or the installation cannot have.

    Args:
        config: The run.
        model_config: The pretrained model's own configuration.

    Raises:
        ValueError: Names the option, the rule and the fix.
    """
    quantization = config.model.quantization
    if not config.model.double_quantization and quantization not in ("nf4", "fp4"):
        raise ValueError(
            f"`model.double_quantization` (False) is for 4 bits, and `model.quantization` is "
            f"{quantization!r}; set that to nf4 or fp4, or drop the option."
        )
    if quantization is None:
        return
    if config.method == "full":
        raise ValueError(
            f"`model.quantization` ({quantization!r}) with `method` ('full'): quantised weights "
            "cannot be trained; choose another method or drop the option."
        )
    if getattr(model_config, "quantization_config", None) is not None:
        raise ValueError(
            f"`model.quantization` ({quantization!r}): {config.model.path} is already saved "
            "quantised; drop the option, or give the original model."
        )
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"`model.quantization` ({quantization!r}) needs bitsandbytes; "
            f"{install_command('quant')}."
        )


def quantization_options(config: "RunConfig", dtype: torch.dtype) -> dict[str, Any]:
    """Return what from_pretrained needs to quantise the model while it loads.

    Args:
        config: The run.
        dtype: Of what is not quantised, and of the products.
    """
    quantization = config.model.quantization
    if quantization is None:
        return {}
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_worth_saying)
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    # FSDP shards weights of one dtype together, and floating ones only.
    is_sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    storage = {"bnb_4bit_quant_storage": dtype} if is_sharded else {}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=config.model.double_quantization,
            bnb_4bit_compute_dtype=dtype,
            **storage,
        )
    }


def _is_worth_saying(record: logging.LogRecord) -> bool:
    """Whether a log line is not the one that every 8-bit layer writes in every forward pass."""
    return "inputs will be cast" not in record.msg
