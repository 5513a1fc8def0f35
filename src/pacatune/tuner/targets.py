"""Checks the target modules before any is replaced, so that an error leaves the model as it was."""

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
)
from peft.utils.other import get_pattern_key
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pacatune.format.options import count_columns
from pacatune.format.tensors import plain_name
from pacatune.ops.whole import whole_shape
from pacatune.tuner.config import PacaConfig, key_of_columns
from pacatune.tuner.convolution import Conv
from pacatune.tuner.embedding import Embedding
from pacatune.tuner.experts import ExpertParameter, Experts
from pacatune.tuner.ignored import refuse_unused_patterns
from pacatune.tuner.layer import PacaLayer
from pacatune.tuner.layout import (
    Conv1DLayout,
    ConvolutionLayout,
    EmbeddingLayout,
    ExpertsLayout,
    Layout,
    adaptable_kind,
    has_layout,
    layout_of,
    supported_kinds,
)
from pacatune.tuner.linear import Linear

LAYERS: dict[type[Layout], type[PacaLayer]] = {
    Layout: Linear,
    Conv1DLayout: Linear,
    ConvolutionLayout: Conv,
    EmbeddingLayout: Embedding,
}
"""Kind of a target -> the layer that adapts it where it is not quantised."""


TORCHS_ATTENTION = (nn.MultiheadAttention, NonDynamicallyQuantizableLinear)
"""Torch's attention, and the output projection in it: its forward never calls a layer."""
NEVER_CALLED = "torch.nn.MultiheadAttention reads its weights and never calls a layer"


class Target(NamedTuple):
    """A weight that a configuration adapts."""

    module: nn.Module
    """The module of the base that it belongs to."""
    parameter_name: str
    """Its name there."""
    rank: int
    """R."""
    num_trained: int
    """How many of its columns are trained, C; R without `channels`."""
    layout: Layout
    """Where they are."""

    @property
    def num_columns(self) -> int:
        """How many the weight has."""
        return self.layout.in_features


def check_targets(
    tuner: BaseTuner | type[BaseTuner], config: PacaConfig, model: nn.Module, **kwargs: Any
) -> dict[str, Target]:
    """Find what is adapted, and refuse what cannot be as the configuration says."""
    targets = find_parameters(tuner, config, model)
    config = _maybe_include_all_linear_layers(copy.copy(config), model)
    _check_names(config, model)
    adapted: tuple[str, ...] = ()
    for name, module in _modules(model).items():
        if not name or name.startswith(adapted):
            continue
        if isinstance(module, BaseTunerLayer):
            adapted += (f"{name}.",)
        if tuner._check_target_module_exists(config, name):
            _refuse_other_method(module, name)
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            base = base.base_layer if isinstance(base, Experts) else base
            kind = _kind_of(base, name, **kwargs)
            rank = for_module(config.rank_pattern, name, config.r)
            layout = kind.of(base, "weight")
            layout.check(rank, name)
            num_trained = count_columns(layout.in_features, rank, config.channels)
            targets[name] = Target(base, "weight", rank, num_trained, layout)
    refuse_unused_patterns(config, targets)
    _refuse_split(model, targets)
    return targets


def _refuse_split(model: nn.Module, targets: dict[str, Target]) -> None:
    """Refuse a model that tensor parallelism has split, whoever did it."""
    modules = list(model.modules())
    # Not by getattr: PEFT's wrappers answer for the model inside them.
    has_plan = any((vars(m).get("_tp_size") or 1) > 1 or "_hf_tp_plan" in vars(m) for m in modules)
    most = any(isinstance(module, FSDPModule) for module in modules)  # dimensions that FSDP2 shards
    for name, target in targets.items():
        weight: Any = target.module._parameters.get(target.parameter_name)
        num_shards = sum(not one.is_replicate() for one in getattr(weight, "placements", ()))
        if has_plan or num_shards > most:
            raise ValueError(
                f"{name!r} is split over several processes by tensor parallelism, which PaCA does "
                "not support; load the model without a `tp_plan`, and shard it by FSDP2 or ZeRO."
            )


def _refuse_other_method(module: nn.Module, name: str) -> None:
    if isinstance(module, BaseTunerLayer) and not isinstance(module, PacaLayer):
        raise TypeError(
            f"Target module {name!r} is adapted already, by {type(module).__module__}; PaCA is not "
            "put on top. Take that adapter off first (`unload`, `merge_and_unload`); if it is "
            "PEFT's own PaCA, import pacatune before the model is made."
        )


def _check_names(config: PacaConfig, model: nn.Module) -> None:
    if not isinstance(config.target_modules, (list, set)):
        return
    names = _modules(model)
    suffixes = {name[i:] for name in names for i, sign in enumerate(f".{name}") if sign == "."}
    missing = sorted(set(config.target_modules) - suffixes)
    if missing and len(missing) < len(config.target_modules):
        raise ValueError(
            f"`target_modules`: {missing} match no module of {type(model).__name__}; training "
            f"would silently leave them out. {available_targets(model)}"
        )


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules by name, except those that stand for an adapted parameter."""
    return {n: m for n, m in model.named_modules() if not isinstance(m, ExpertParameter)}


def available_targets(model: nn.Module) -> str:
    """Return a sentence that lists the names of all modules that can be adapted, with counts."""
    names = []
    for name, module in _modules(model).items():
        base = module.base_layer if isinstance(module, Experts) else module
        is_target = has_layout(base) or isinstance(module, BaseTunerLayer)
        if is_target and not isinstance(base, TORCHS_ATTENTION) and ".base_layer" not in name:
            names.append(name)
    return f"It has these layers: {_counted(names, 1)}."


def _counted(names: list[str], num_parts: int) -> str:
    """Return the last parts of names, without numbers of layers, and how often each occurs."""
    words = {name: [part for part in name.split(".") if not part.isdigit()] for name in names}
    counts = Counter(".".join(parts[-num_parts:]) or name for name, parts in words.items())
    return ", ".join(f"{word} ({count})" for word, count in sorted(counts.items())) or "none"


def _kind_of(base: nn.Module, name: str, **kwargs: Any) -> type[Layout]:
    """Return the kind of a target that can be adapted, or say why it cannot."""
    parametrizations = getattr(base, "parametrizations", None)
    names = list(parametrizations) if isinstance(parametrizations, nn.ModuleDict) else []
    if {"weight_g", "weight_orig"} & base._parameters.keys():
        names.append("weight")  # by a hook: the older weight_norm, spectral_norm, and pruning
    if names:
        raise ValueError(
            f"Target module {name!r} has a parametrised {' and '.join(names)}; its columns cannot "
            "be trained in place. Remove the parametrisation first (remove_parametrizations, "
            "remove_weight_norm, prune.remove), or drop it from `target_modules`."
        )
    if isinstance(base, TORCHS_ATTENTION):
        raise TypeError(
            f"Target module {name!r} is not supported: {NEVER_CALLED}. Adapt other layers; "
            "the attention of transformers has linear layers of its own."
        )
    kind = adaptable_kind(base, **kwargs)
    if kind is None:
        raise TypeError(
            f"Target module {name!r} ({type(base).__name__}) is not supported. PaCA adapts "
            f"{supported_kinds()}."
        )
    LAYERS[kind].check_base(base, name)
    return kind


def find_parameters(
    tuner: BaseTuner | type[BaseTuner], config: PacaConfig, model: nn.Module
) -> dict[str, Target]:
    """Return the parameters to adapt, whose names' ends are in `target_parameters`."""
    targets = config.target_parameters or []
    parameters = _bare_parameters(model) if targets else {}
    missing = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in parameters)]
    if missing:
        raise ValueError(
            f"`target_parameters`: {missing} match no parameter of {type(model).__name__}. "
            f"{_available_parameters(parameters)}"
        )
    config = copy.copy(config)
    config.target_modules = config.target_parameters
    found: dict[str, Target] = {}
    for name, module in parameters.items():
        owner, _, parameter_name = name.rpartition(".")
        is_excluded = isinstance(tuner._check_target_module_exists(config, owner), _ExcludedModule)
        if tuner._check_target_module_exists(config, name) and not is_excluded:
            layout = _layout_of_parameter(name, module, config, parameters)
            rank = for_module(config.rank_pattern, name, config.r)
            layout.check(rank, name)
            num_trained = count_columns(layout.in_features, rank, config.channels)
            found[name] = Target(module, parameter_name, rank, num_trained, layout)
    if targets and not found:
        raise ValueError(
            f"`target_parameters` ({targets}): every parameter of these names is left out by "
            "`exclude_modules`, `modules_to_save` or `layers_to_transform`."
        )
    return found


def _bare_parameters(model: nn.Module) -> dict[str, nn.Module]:
    """Return the module of each parameter, by the parameter's name in the base model."""
    return {
        plain_name(f"{name}.{parameter_name}".removeprefix(".")): module
        for name, module in model.named_modules()
        for parameter_name, parameter in module._parameters.items()
        if parameter is not None and ".paca_" not in name
    }


def _layout_of_parameter(
    name: str, module: nn.Module, config: PacaConfig, parameters: dict[str, nn.Module]
) -> Layout:
    """Return the layout of a parameter that can be adapted, or say why it cannot."""
    owner, _, parameter_name = name.rpartition(".")
    parameter: Any = getattr(module, parameter_name)
    shape = whole_shape(parameter)
    if len(shape) != 3:
        raise ValueError(
            f"`target_parameters`: {name!r} has shape {shape}; it must be the three-dimensional "
            f"weight of all experts. Layers are named in `target_modules`. "
            f"{_available_parameters(parameters)}"
        )
    layout = layout_of(module, parameter_name)
    if not isinstance(layout, ExpertsLayout) or not owner:
        raise TypeError(
            f"Target parameter {name!r} ({type(module).__name__}) is not supported: PaCA adapts "
            "the weights of experts modules that run on the experts interface of transformers 5. "
            f"{_available_parameters(parameters)}"
        )
    is_shared_out = getattr(module, "_is_expert_parallel", False)
    if is_shared_out or not parameter.is_floating_point() or hasattr(parameter, "placements"):
        raise TypeError(
            f"Target parameter {name!r} is {parameter.dtype} {type(parameter).__name__}; quantised "
            "and sharded experts are not supported. Adapt the model before it is sharded, or load "
            "it in 16 bits."
        )
    if config.bias != "none" and getattr(module, "has_bias", False):
        raise ValueError(
            f"`bias` ({config.bias!r}) must be 'none' with {name!r}: its experts have biases, "
            "which PEFT would train but not save."
        )
    return layout


def _available_parameters(parameters: dict[str, nn.Module]) -> str:
    names = [
        name
        for name, module in parameters.items()
        if isinstance(layout_of(module, name.rpartition(".")[2]), ExpertsLayout)
    ]
    return f"It has these expert parameters: {_counted(names, 2)}."


@contextmanager
def parameters_count(config: PacaConfig) -> Iterator[None]:
    """Let patterns name adapted parameters too: PEFT warns of all that match no module."""
    with warnings.catch_warnings():
        if config.target_parameters:  # `check_targets` refuses what matches neither
            message = "The following (rank|alpha)_pattern keys"
            warnings.filterwarnings("ignore", message, RuntimeWarning)
        yield


def ranks_of(config: PacaConfig, name: str) -> dict[str, Any]:
    """Return rank, alpha and given columns of a target, patterns resolved."""
    rank = for_module(config.rank_pattern, name, config.r)
    columns: Any = None
    if isinstance(config.columns, str):  # none, until the file is loaded
        columns = config.columns
    elif config.columns and (key := key_of_columns(config.columns, name)) is not None:
        columns = config.columns[key]
    return {
        "r": rank,
        "paca_alpha": for_module(config.alpha_pattern, name, config.paca_alpha),
        "columns": columns,
    }


def for_module(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of the pattern that matches a module's name, or the default."""
    if not patterns:
        return default
    return patterns.get(get_pattern_key(patterns.keys(), name), default)
