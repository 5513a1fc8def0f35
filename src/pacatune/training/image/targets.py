"""What of an image model is trained: its head, and by an adapter or not the layers below."""

from collections import Counter
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from torch.nn.modules.conv import _ConvNd

from pacatune.methods import METHODS, Method
from pacatune.training.config import RunConfig
from pacatune.training.image.model import ImageBase, find_batch_norms, find_heads
from pacatune.training.task import Plan, make_adapter_config, make_plan, put_adapter
from pacatune.tuner.defaults import default_targets, survey
from pacatune.tuner.layout import ConvolutionLayout, adaptable_kind
from pacatune.tuner.targets import available_targets


def choose_adapter(config: RunConfig, base: ImageBase) -> tuple[PeftConfig | None, list[str]]:
    """Return the PEFT configuration of the method, None where it needs none, and notes."""
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
    made: Any = make_adapter_config(config, model, **values)
    if not method.is_paca:
        check_lora_targets(model, made)
    return made, notes


def plan_training(config: RunConfig, base: ImageBase, adapter_config: PeftConfig | None) -> Plan:
    """Say what would be trained, without a single weight."""
    return make_plan(
        base.empty_model(), lambda model: make_trainable(model, config, adapter_config), config
    )


def make_trainable(model: Any, config: RunConfig, adapter_config: PeftConfig | None) -> nn.Module:
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


def choose_targets(
    model: nn.Module, method: Method, rank: int, heads: list[str]
) -> tuple[set[str] | str, list[str]]:
    """Return the default targets, and what to tell the user about those left out.

    Transformers get the linear layers of their blocks, as language models do. Where convolutions
    hold more weights, they are the targets, those with enough channels and of a kind that the
    method can adapt; not the heads, which are trained in full.
    """
    modules = dict(model.named_modules())
    reasons = survey(model)
    convolutions = {
        name: cast(_ConvNd, modules[name])
        for name, reason in reasons.items()
        if reason == ConvolutionLayout.word and not _is_in(name, heads)
    }
    linear = [name for name, reason in reasons.items() if not reason]
    if _num_weights(modules, linear) >= _num_weights(modules, list(convolutions)):
        return default_targets(model), []
    if method.is_moslora:
        raise ValueError(
            f"`method` (moslora) adapts linear layers, and {type(model).__name__} has most of its "
            "weights in convolutions; use paca, lora or dora, or set `lora.target_modules`."
        )
    is_paca = method.is_paca
    narrow = {name for name, layer in convolutions.items() if layer.in_channels < rank}
    grouped = {name for name, layer in convolutions.items() if layer.groups > 1 and not is_paca}
    targets = {
        name
        for name in convolutions.keys() - narrow - grouped
        if not is_paca or adaptable_kind(modules[name]) is not None
    }
    if not targets:
        section = method.sections[0]
        most = max(layer.in_channels for layer in convolutions.values())
        raise ValueError(
            f"`{section}.r` ({rank}) leaves {type(model).__name__} without a layer to adapt: its "
            f"convolutions have up to {most} input channels; lower it, or set "
            f"`{section}.target_modules`."
        )
    notes = []
    if narrow:
        notes.append(f"{_some(narrow)} left as it is: fewer input channels than the rank {rank}.")
    if grouped:
        notes.append(
            f"{_some(grouped)} left as it is: a LoRA adapter of a grouped (depthwise) convolution "
            "could not be merged. The method paca adapts it."
        )
    return targets, notes


def check_names(model: nn.Module, targets: list[str] | str, option: str) -> None:
    """Refuse names of targets that match nothing, for which PEFT may only say that none was left.

    A regular expression is not checked. `option` is where they are from.
    """
    if isinstance(targets, str):
        return
    names = [f".{name}" for name, _ in model.named_modules()]
    missing = [target for target in targets if not any(n.endswith(f".{target}") for n in names)]
    if missing:
        raise ValueError(
            f"`{option}`: {missing} match no module of {type(model).__name__}. "
            f"{available_targets(model)}"
        )


def check_lora_targets(model: nn.Module, config: PeftConfig) -> None:
    """Refuse convolutions that LoRA of this rank cannot adapt, before PEFT does in the middle."""
    for name, layer in model.named_modules():
        if not isinstance(layer, _ConvNd) or layer.groups == 1:
            continue
        if check_target_module_exists(config, name) and config.r % layer.groups:
            raise ValueError(
                f"`lora.target_modules` names {name!r}, a convolution in {layer.groups} groups: "
                f"LoRA can adapt it only with a multiple of {layer.groups} as `lora.r` "
                f"({config.r}), and could not merge it. Leave it out, or use the method paca."
            )


def _num_weights(modules: dict[str, Any], names: list[str]) -> int:
    return sum(modules[name].weight.numel() for name in names)


def _is_in(name: str, parents: list[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def _some(names: set[str]) -> str:
    counts = Counter(name.rpartition(".")[2] for name in names)
    return ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()))
