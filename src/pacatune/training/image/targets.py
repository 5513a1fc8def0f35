"""What of an image model is trained: its head, and by an adapter or not the layers below."""

from collections import Counter
from typing import Any

from peft import PeftConfig
from torch import nn

from pacatune.methods import METHODS, Method
from pacatune.training.config import RunConfig
from pacatune.training.image.model import ImageBase, find_batch_norms, find_heads
from pacatune.training.task import Plan, make_adapter_config, make_plan, put_adapter
from pacatune.tuner.defaults import default_targets, survey
from pacatune.tuner.layout import ConvolutionLayout, adaptable_kind


def choose_adapter(config: RunConfig, base: ImageBase) -> tuple[PeftConfig | None, list[str]]:
    """Return the PEFT configuration of the method, None where it needs none, and notes."""
    method, model = METHODS[config.method], base.empty_model()
    batch_norms = list(find_batch_norms(model)) if config.training.train_batch_norm else []
    if config.training.train_batch_norm and not batch_norms:
        raise ValueError(
            f"`training.train_batch_norm` is true, but {type(model).__name__} has no BatchNorm; "
            "leave it out."
        )
    if not method.has_adapter:
        return None, []
    heads = find_heads(model)
    section = config.paca if method.is_paca else config.lora
    values: dict[str, Any] = {}
    notes: list[str] = []
    if section.target_modules is None:
        values["target_modules"], notes = choose_targets(model, method, section.r, heads)
    else:
        values["exclude_modules"] = _exclude(section.exclude_modules, heads)
    values["modules_to_save"] = sorted({*heads, *batch_norms, *(section.modules_to_save or [])})
    values["revision"] = config.model.revision
    return make_adapter_config(config, model, **values), notes


def plan_training(config: RunConfig, base: ImageBase, adapter_config: PeftConfig | None) -> Plan:
    """Say what would be trained, without a single weight."""
    return make_plan(
        base.empty_model(), lambda model: make_trainable(model, config, adapter_config), config
    )


def make_trainable(model: Any, config: RunConfig, adapter_config: PeftConfig | None) -> Any:
    """Put the adapter on a model, or set which of its weights are trained."""
    if adapter_config is None:
        heads = tuple(f"{name}." for name in find_heads(model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(config.method == "full" or name.startswith(heads))
        return model
    trained = put_adapter(model, adapter_config)
    for layer in find_batch_norms(trained).values():
        # Saved for their statistics; scale and shift stay the pretrained ones.
        layer.requires_grad_(False)
    return trained


def _exclude(given: list[str] | str | None, heads: list[str]) -> list[str] | str:
    """Keep adapters off the heads, which are trained in full."""
    if isinstance(given, str):
        return rf"(?:{given})|(?:{'|'.join(name.replace('.', '[.]') for name in heads)})"
    return [*(given or []), *heads]


def choose_targets(
    model: nn.Module, method: Method, rank: int, heads: list[str]
) -> tuple[set[str] | str, list[str]]:
    """Return the default targets, and what to tell the user about those left out.

    Transformers get the linear layers of their blocks, as language models do. Where convolutions
    hold more weights, they are the targets, those with enough channels and of a kind that the
    method can adapt; not the heads, which are trained in full.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    in_heads = tuple(f"{name}." for name in heads)
    reasons = survey(model)
    linear = [name for name, reason in reasons.items() if not reason]
    convolutions = [
        name
        for name, reason in reasons.items()
        if reason == ConvolutionLayout.word and not f"{name}.".startswith(in_heads)
    ]
    sizes = [sum(modules[n].weight.numel() for n in names) for names in (linear, convolutions)]
    if sizes[0] >= sizes[1]:
        return default_targets(model), []
    if method.is_moslora:
        raise ValueError(
            f"`method` (moslora) adapts linear layers, and {type(model).__name__} has most of its "
            "weights in convolutions; use paca, lora or dora, or set `lora.target_modules`."
        )
    narrow = [name for name in convolutions if modules[name].in_channels < rank]
    grouped = [name for name in convolutions if modules[name].groups > 1 and not method.is_paca]
    targets = {
        name
        for name in set(convolutions) - {*narrow, *grouped}
        if not method.is_paca or adaptable_kind(modules[name]) is not None
    }
    if not targets:
        most = max(modules[name].in_channels for name in convolutions)
        raise ValueError(
            f"`{method.sections[0]}.r` ({rank}) leaves {type(model).__name__} without a layer to "
            f"adapt: its convolutions have up to {most} input channels; lower it, or set "
            "`target_modules`."
        )
    left = {
        f"fewer input channels than the rank {rank}.": narrow,
        "a LoRA adapter of a grouped (depthwise) convolution could not be merged. The method paca "
        "adapts it.": grouped,
    }
    return targets, [f"{_some(n)} left as it is: {why}" for why, n in left.items() if n]


def _some(names: list[str]) -> str:
    counts = Counter(name.rpartition(".")[2] for name in names)
    return ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()))
