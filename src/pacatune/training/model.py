"""Tokenizer, targets and weights of the model; all that can be checked is, before the weights."""

import copy
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pacatune import pretrained
from pacatune.methods import METHODS, adapter_config
from pacatune.precision import choose_dtype
from pacatune.training.any_run import AnyRun
from pacatune.training.config import RunConfig

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Plan:
    """What will be trained, known without a single weight."""

    targets: dict[str, str]
    """Name of each adapted module -> its shape, as "576 -> 192"."""
    num_trainable_parameters: int
    num_parameters: int
    max_positions: int | None
    """Longest sequence that the model has positions for."""

    def summary(self) -> list[str]:
        """Return a line per kind of target, such as `30 x q_proj (576 -> 576)`.

        Where layers of a name differ in size, as in a CNN, the name alone: `17 x conv_pw`.
        """
        shapes: dict[str, list[str]] = {}
        for name, shape in self.targets.items():
            shapes.setdefault(name.rpartition(".")[2], []).append(shape)
        return [
            f"{len(found)} x {name}" + (f" ({found[0]})" if len(set(found)) == 1 else "")
            for name, found in shapes.items()
        ]


def model_path(config: RunConfig) -> str:
    """Return the hub id, or the absolute path of a local folder."""
    return pretrained.find_model(config.model.path, config.model.revision)


def load_tokenizer(config: RunConfig) -> "PreTrainedTokenizerBase":
    """Load the tokenizer with the chat template and stop token of the run.

    Raises:
        ValueError: If the model needs code of its own, or `training.eos_token` is unknown.
    """
    tokenizer = pretrained.load_tokenizer(model_path(config), revision=config.model.revision)
    if config.data.chat_template is not None:
        tokenizer.chat_template = _read_template(config.data.chat_template)
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template["default"]
    stop = config.training.eos_token
    if stop is not None:
        if stop not in tokenizer.get_vocab():
            raise ValueError(
                f"`training.eos_token` ({stop!r}) is not in the vocabulary of the tokenizer; "
                f"use one of its tokens (its own is {tokenizer.eos_token!r})."
            )
        tokenizer.eos_token = stop
    return tokenizer


def find_stop_ids(config: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> set[int]:
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


def check_attention(config: RunConfig) -> None:
    """Refuse to pack examples with attention that would let them see each other.

    Raises:
        ValueError: If packing or padding-free batches are asked for without flash attention.
    """
    training = config.training
    packed = training.packing or training.eval_packing or training.padding_free
    attention = config.model.attn_implementation
    if packed and "flash" not in (attention or ""):
        raise ValueError(
            f"`training.packing` or `training.padding_free` with `model.attn_implementation` "
            f"({attention!r}): flash attention alone keeps packed examples apart in every model; "
            "set it to flash_attention_2, flash_attention_3 or a flash-attn kernel, or do not pack."
        )


def make_adapter_config(config: RunConfig) -> "PeftConfig | None":
    """Return the PEFT configuration of the method; None where every weight is trained."""
    if not METHODS[config.method].has_adapter:
        return None
    return adapter_config(METHODS[config.method], task_type="CAUSAL_LM", **adapter_options(config))


def adapter_options(config: AnyRun) -> dict[str, Any]:
    """Return the options of a run's adapter, as PEFT's class of the method takes them."""
    method = METHODS[config.method]
    if method.is_paca:
        options: dict[str, Any] = config.paca.adapter_options()
        return options
    more = asdict(config.moslora) if method.is_moslora else {}
    return {**asdict(config.lora), **more}


def plan_training(config: RunConfig, adapter_config: "PeftConfig | None") -> Plan:
    """Put the adapter on a model without weights, and say what it trains.

    Targets that are not set are set to the default, the same for every method.

    Raises:
        ValueError: If the model is no causal language model, or the targets match nothing.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import AutoModelForCausalLM

    from pacatune.tuner.config import refuse_idle_layers
    from pacatune.tuner.defaults import default_targets
    from pacatune.tuner.ignored import get_strict_peft_model

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
    targets: dict[str, str] = {}
    if adapter_config is not None:
        if adapter_config.target_modules is None:
            adapter_config.target_modules = default_targets(model)
        refuse_idle_layers(adapter_config)
        planned = copy.deepcopy(adapter_config)
        if METHODS[config.method].is_paca:
            # No weights are read for a plan.
            planned.columns_from = "dequantized"
            if planned.columns is None:
                planned.selection = "random"
        wrapped = get_strict_peft_model(model, planned, low_cpu_mem_usage=True)
        if isinstance(wrapped.get_output_embeddings(), BaseTunerLayer):
            # TRL multiplies by the weight of the head itself, past any adapter on it.
            raise ValueError(
                f"`{_section(config)}.target_modules` names the output head, which the loss reads "
                "directly, so an adapter there would not be trained; drop it."
            )
        for name, module in wrapped.get_base_model().named_modules():
            if isinstance(module, BaseTunerLayer):
                targets[name] = f"{module.in_features} -> {module.out_features}"
    require_lean(config.lean, model)
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    text_config = model_config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    return Plan(targets, num_trainable, num_parameters, positions)


def require_lean(mode: str, model: nn.Module) -> None:
    """Refuse a model, weights or not, that keeps more for backward than `require` allows.

    Raises:
        ValueError: Says what cannot be made lean, and why.
    """
    from pacatune import lean

    if mode == "require":
        lean.enable(model, mode)
        lean.disable(model)


def load_model(config: RunConfig) -> "PreTrainedModel":
    """Load the weights, in the type that `model.dtype` asks for."""
    from transformers import AutoModelForCausalLM

    dtype = weights_dtype(config)
    options: dict[str, Any] = dict(config.training.model_init_kwargs or {})
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


def check_quantization(config: RunConfig, model_config: Any) -> None:
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


def quantization_options(config: RunConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return what from_pretrained needs to quantise the model while it loads.

    Args:
        config: The run.
        dtype: Of what is not quantised, and of the products.
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


def weights_dtype(config: RunConfig) -> torch.dtype:
    """Return the type in which the weights of the run's model are held."""
    checkpoint = getattr(_load_model_config(config), "dtype", None)
    return choose_dtype(
        config.model.dtype,
        checkpoint if isinstance(checkpoint, torch.dtype) else None,
        full=config.method == "full",
        use_cpu=config.training.use_cpu,
    )


def count_trainable(model: nn.Module) -> int:
    """Return the number of trained values, counting sharded ones in full."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _section(config: RunConfig) -> str:
    return METHODS[config.method].sections[0]


def _load_model_config(config: RunConfig) -> Any:
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
