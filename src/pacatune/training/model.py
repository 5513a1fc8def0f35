"""A language model of a run: its tokenizer, what is trained of it, its weights."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pacatune import pretrained
from pacatune.methods import METHODS
from pacatune.precision import choose_dtype
from pacatune.training.config import BaseRunConfig
from pacatune.training.plan import (
    Plan,
    complete_targets,
    make_adapter_config,
    make_plan,
    put_adapter,
)

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def model_path(config: BaseRunConfig[Any]) -> str:
    """Return the hub id, or the absolute path of a local folder."""
    return pretrained.find_model(config.model.path, config.model.revision)


def load_tokenizer(config: BaseRunConfig[Any]) -> "PreTrainedTokenizerBase":
    """Load the tokenizer with the chat template and stop token of the run.

    Raises:
        ValueError: If the model needs code of its own, or `training.eos_token` is unknown.
    """
    tokenizer = pretrained.load_tokenizer(model_path(config), revision=config.model.revision)
    if config.data.chat_template is not None:
        tokenizer.chat_template = _read_template(config.data.chat_template)
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template["default"]
    stop = getattr(config.training, "eos_token", None)
    if stop is not None:
        if stop not in tokenizer.get_vocab():
            raise ValueError(
                f"`training.eos_token` ({stop!r}) is not in the vocabulary of the tokenizer; "
                f"use one of its tokens (its own is {tokenizer.eos_token!r})."
            )
        tokenizer.eos_token = stop
    return tokenizer


def find_stop_ids(config: BaseRunConfig[Any], tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the tokens at which a generation of this model ends."""
    from transformers import GenerationConfig

    ids = {tokenizer.eos_token_id}
    try:
        generation = GenerationConfig.from_pretrained(
            model_path(config), revision=config.model.revision
        )
    except OSError:  # Older models have no generation_config.json.
        return ids - {None}
    stops = generation.eos_token_id
    return ids | set(stops if isinstance(stops, list) else [stops]) - {None}


def plan_training(config: BaseRunConfig[Any]) -> "tuple[Plan, PeftConfig | None, int | None]":
    """Put the adapter on a model without weights, and say what it trains.

    Returns:
        The plan, the adapter's configuration with its targets, and the longest sequence that the
        model has positions for.

    Raises:
        ValueError: If the model is no causal language model, or the targets match nothing.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import AutoModelForCausalLM

    model_config = _load_model_config(config)
    check_quantization(config, model_config)
    attention = config.model.attn_implementation
    try:
        model = pretrained.empty_model(
            AutoModelForCausalLM, model_config, attn_implementation=attention
        )
    except ImportError as error:
        raise ValueError(
            f"`model.attn_implementation` ({attention!r}) cannot be used: {error}. Install it or "
            "choose another."
        ) from error
    num_parameters = model.num_parameters()
    adapter = make_adapter_config(config, task_type="CAUSAL_LM")
    if adapter is not None:
        complete_targets(adapter, model)
        put_adapter(model, adapter)
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            # TRL multiplies by the weight of the head itself, past any adapter on it.
            section = METHODS[config.method].sections[0]
            raise ValueError(
                f"`{section}.target_modules` names the output head, which the loss reads "
                "directly, so an adapter there would not be trained; drop it."
            )
    plan = make_plan(model, num_parameters, config.lean)
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return plan, adapter, positions


def load_model(config: BaseRunConfig[Any]) -> "PreTrainedModel":
    """Load the weights, in the type that `model.dtype` asks for."""
    from transformers import AutoModelForCausalLM

    dtype = weights_dtype(config)
    options: dict[str, Any] = dict(getattr(config.training, "model_init_kwargs", None) or {})
    options |= quantization_options(config, dtype)
    model: PreTrainedModel = pretrained.load_weights(
        AutoModelForCausalLM,
        model_path(config),
        dtype=dtype,
        revision=config.model.revision,
        attn_implementation=config.model.attn_implementation,
        use_safetensors=True,
        **options,
    )
    return model


def check_quantization(config: BaseRunConfig[Any], model_config: Any) -> None:
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
    pretrained.check_quantizable(
        quantization, model_config, config.model.path, option="model.quantization"
    )


def quantization_options(config: BaseRunConfig[Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return what from_pretrained needs to quantise the model while it loads.

    Args:
        config: The run.
        dtype: Type of what is not quantised, and of the products.
    """
    quantization = config.model.quantization
    if quantization is None:
        return {}
    # FSDP shards weights of one dtype together, and floating ones only.
    is_sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    made = pretrained.bitsandbytes_config(
        quantization,
        dtype,
        double=config.model.double_quantization,
        storage=dtype if is_sharded else None,
    )
    return {"quantization_config": made}


def weights_dtype(config: BaseRunConfig[Any]) -> torch.dtype:
    """Return the type in which the weights of the run's model are held."""
    checkpoint = getattr(_load_model_config(config), "dtype", None)
    return choose_dtype(
        config.model.dtype,
        checkpoint if isinstance(checkpoint, torch.dtype) else None,
        full=config.method == "full",
        use_cpu=config.training.use_cpu,
    )


def _load_model_config(config: BaseRunConfig[Any]) -> Any:
    return pretrained.load_config(model_path(config), revision=config.model.revision)


def _read_template(template: str) -> str:
    if "{" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"`data.chat_template` ({template!r}) is neither a file nor Jinja text; "
            "give a .jinja file, or the text with its {{ }} and {% %}."
        )
    return path.read_text(encoding="utf-8")
