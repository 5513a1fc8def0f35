"""Adapter, plan and weights of an image model."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pacatune.methods import METHODS
from pacatune.pretrained import load_weights
from pacatune.training.image.base import ImageBase
from pacatune.training.image.config import ImageRunConfig
from pacatune.training.image.parts import find_batch_norms, find_heads, reset_heads
from pacatune.training.image.targets import check_lora_targets, check_names, choose_targets
from pacatune.training.plan import Plan, make_adapter_config, make_plan, put_adapter

if TYPE_CHECKING:
    from peft import PeftConfig


def choose_adapter(
    config: ImageRunConfig, base: ImageBase
) -> "tuple[PeftConfig | None, list[str]]":
    """Return the PEFT configuration of the method, None where it needs none, and notes.

    Raises:
        ValueError: If the model has nothing to adapt, or LoRA cannot adapt a target.
    """
    method = METHODS[config.method]
    if not method.has_adapter:
        return None, []
    model = base.empty_model()
    heads = find_heads(model)
    section = config.paca if method.is_paca else config.lora
    values: dict[str, Any] = {}
    notes: list[str] = []
    if section.target_modules is None:
        values["target_modules"], notes = choose_targets(model, method, section.r, heads)
    else:
        option = f"{method.sections[0]}.target_modules"
        check_names(model, section.target_modules, option)
        values["exclude_modules"] = _exclude(section.exclude_modules, heads)
    saved = heads + list(section.modules_to_save or [])
    if config.training.train_batch_norm:
        saved += _batch_norms_or_refuse(model)
    values["modules_to_save"] = sorted(set(saved))
    values["revision"] = config.model.revision
    made: Any = make_adapter_config(config, **values)
    if method.is_paca:
        from pacatune.tuner.config import refuse_idle_layers

        refuse_idle_layers(made)
    else:
        check_lora_targets(model, made)
    return made, notes


def plan_training(
    config: ImageRunConfig, base: ImageBase, adapter_config: "PeftConfig | None"
) -> Plan:
    """Say what would be trained, without a single weight.

    Raises:
        ValueError: If the targets match nothing or cannot be adapted.
    """
    model = base.empty_model()
    num_parameters = sum(p.numel() for p in model.parameters())
    make_trainable(model, config, adapter_config)
    return make_plan(model, num_parameters, config.lean)


def load_model(base: ImageBase, dtype: torch.dtype, attention: str | None = None) -> Any:
    """Load the weights; a new head gets random ones, from torch's global generator.

    Raises:
        ValueError: If weights other than the head's are missing or of other shapes.
    """
    from transformers import AutoModelForImageClassification

    model, info = load_weights(
        AutoModelForImageClassification,
        base.path,
        dtype=dtype,
        revision=base.revision,
        config=base.config,
        attn_implementation=attention,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        use_safetensors=True,
    )
    heads = find_heads(model)
    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    prefixes = () if base.has_own_head else tuple(f"{name}." for name in heads)
    lost = [k for k in [*info["missing_keys"], *mismatched] if not k.startswith(prefixes)]
    if lost:
        raise ValueError(
            f"{base.path} lacks {len(lost)} weights of {type(model).__name__}, or has them in "
            f"other shapes, first {sorted(lost)[0]!r}: they would be random. Use a complete model."
        )
    if not base.has_own_head:
        reset_heads(model, heads)
    return model


def make_trainable(
    model: Any, config: ImageRunConfig, adapter_config: "PeftConfig | None"
) -> nn.Module:
    """Put the adapter on a model, or set which of its weights are trained."""
    if adapter_config is None:
        heads = tuple(f"{name}." for name in find_heads(model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(config.method == "full" or name.startswith(heads))
        if config.training.train_batch_norm:
            _batch_norms_or_refuse(model)
        trained: nn.Module = model
        return trained
    trained = put_adapter(model, adapter_config)
    for layer in find_batch_norms(trained).values():
        # Saved for their statistics; scale and shift stay the pretrained ones.
        layer.requires_grad_(False)
    return trained


def _batch_norms_or_refuse(model: nn.Module) -> list[str]:
    names = list(find_batch_norms(model))
    if not names:
        raise ValueError(
            f"`training.train_batch_norm` is true, but {type(model).__name__} has no BatchNorm; "
            "leave it out."
        )
    return names


def _exclude(given: list[str] | str | None, heads: list[str]) -> list[str] | str:
    """Keep adapters off the heads, which are trained in full."""
    if isinstance(given, str):
        return rf"(?:{given})|(?:{'|'.join(name.replace('.', '[.]') for name in heads)})"
    return [*(given or []), *heads]
