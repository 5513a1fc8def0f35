"""Which layers of an image model are adapted where the user names none."""

from collections import Counter
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from torch.nn.modules.conv import _ConvNd

from pacatune.methods import Method
from pacatune.tuner.defaults import default_targets, survey
from pacatune.tuner.layout import ConvolutionLayout, adaptable_kind
from pacatune.tuner.targets import available_targets


def choose_targets(
    model: nn.Module, method: Method, rank: int, heads: list[str]
) -> tuple[set[str] | str, list[str]]:
    """Return the default targets, and what to tell the user about those left out.

    Transformers get the linear layers of their blocks, as language models do. Where convolutions
    hold more weights, they are the targets, those with enough channels and of a kind that the
    method can adapt.

    Args:
        model: The base model, weights not needed.
        method: One with adapters.
        rank: Rank of the adapter.
        heads: Names of the modules that are trained in full.

    Raises:
        ValueError: If the model has nothing that the method adapts, with this rank at least.
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

    Args:
        model: The base model, weights not needed.
        targets: Names, or a regular expression, which is not checked.
        option: Where they are from, for the message.

    Raises:
        ValueError: Lists them and what there is.
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
    """Refuse convolutions that LoRA of this rank cannot adapt, before PEFT does in the middle.

    Args:
        model: The base model, weights not needed.
        config: A LoRA configuration with its targets.

    Raises:
        ValueError: Names the first layer.
    """
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
