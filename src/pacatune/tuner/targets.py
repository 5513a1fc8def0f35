"""Checks the target modules before any is replaced, so that an error leaves the model as it was."""

import copy
import re
from collections import Counter
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
)
from peft.utils.other import get_pattern_key
from torch import nn

from pacatune.tuner.config import PacaConfig
from pacatune.tuner.kinds import is_supported, layer_class, supported_kinds
from pacatune.tuner.layer import PacaLayer, check_rank

__all__ = ["available_targets", "check_targets", "for_module"]


def check_targets(tuner: BaseTuner, config: PacaConfig, model: nn.Module, **kwargs: Any) -> None:
    """Refuse targets that cannot be adapted as the configuration says.

    Args:
        tuner: Knows which module names match the configuration.
        config: Its `target_modules` are given or set to the architecture's default.
        model: The model to be adapted; not changed.
        **kwargs: What PEFT needs to recognise quantised layers.

    Raises:
        ValueError: If some of the target names match nothing, a rank exceeds its weight's
            in_features, or a weight is parametrised.
        TypeError: If a target is no linear layer of a supported kind.
    """
    config = _maybe_include_all_linear_layers(copy.copy(config), model)
    _check_names(config, model)
    adapted: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(adapted):
            continue
        if isinstance(module, BaseTunerLayer):
            adapted += (f"{name}.",)
        if tuner._check_target_module_exists(config, name):
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            num_columns = _layer_class(base, name, **kwargs).num_columns_of(base)
            check_rank(for_module(config.rank_pattern, name, config.r), num_columns, name)


def _check_names(config: PacaConfig, model: nn.Module) -> None:
    if not isinstance(config.target_modules, (list, set)):
        return
    names = [name for name, _ in model.named_modules()]
    suffixes = {name[i:] for name in names for i in _suffix_starts(name)}
    missing = sorted(set(config.target_modules) - suffixes)
    if missing and len(missing) < len(config.target_modules):
        raise ValueError(
            f"`target_modules`: {missing} match no module of {type(model).__name__}; training "
            f"would silently leave them out. {available_targets(model)}"
        )


def _suffix_starts(name: str) -> list[int]:
    return [0] + [match.end() for match in re.finditer(r"\.", name)]


def available_targets(model: nn.Module) -> str:
    """Return a sentence that lists the names of all modules that can be adapted, with counts."""
    counts: Counter[str] = Counter()
    for name, module in model.named_modules():
        if (
            is_supported(module) or isinstance(module, BaseTunerLayer)
        ) and ".base_layer" not in name:
            parts = [part for part in name.split(".") if not part.isdigit()]
            counts[parts[-1] if parts else name] += 1
    listed = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
    return f"It has these linear layers: {listed or 'none'}."


def _layer_class(base: nn.Module, name: str, **kwargs: Any) -> type[PacaLayer]:
    """Return the class that adapts a target, or say why none does."""
    parametrizations = getattr(base, "parametrizations", None)
    if isinstance(parametrizations, nn.ModuleDict):
        raise ValueError(
            f"Target module {name!r} has a parametrised {' and '.join(parametrizations)}; its "
            "columns cannot be trained in place. Call "
            "torch.nn.utils.parametrize.remove_parametrizations first, or drop it from "
            "`target_modules`."
        )
    layer = layer_class(base, **kwargs)
    if layer is None:
        raise TypeError(
            f"Target module {name!r} ({type(base).__name__}) is not supported. PaCA adapts "
            f"{supported_kinds()}."
        )
    return layer


def for_module(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of the pattern that matches a module's name, or the default."""
    if not patterns:
        return default
    return patterns.get(get_pattern_key(patterns.keys(), name), default)
