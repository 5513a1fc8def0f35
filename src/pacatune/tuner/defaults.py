"""Which layers are adapted where `target_modules` is not given.

The linear layers of the repeated blocks, all of them, as in the paper (Sec. 4). They are found by
structure and not by names: libraries rename and fuse modules, and a list per architecture then
trains a part of the model only, or nothing. What is left out, and why:

    outside the blocks           heads, poolers, projections, embeddings: their output is the task's
    beside the language model    vision and audio towers of generative models, which servers of
                                 LoRA adapters do not adapt either
    router                       linear layers beside `experts`: a small change reroutes tokens
    state-space mixer            its kernels read the weights and never call the layers
    torch's MultiheadAttention   it reads the weights of its projections and never calls them
    bare parameters              fused experts are no layers; see `target_parameters`
"""

import functools
import itertools
import logging
import re
from collections import Counter
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _find_minimal_target_modules
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from pacatune.tuner.config import refuse_idle_layers
from pacatune.tuner.ignored import own_modules
from pacatune.tuner.layout import Conv1DLayout, Layout, adaptable_kind
from pacatune.tuner.targets import NEVER_CALLED, TORCHS_ATTENTION, available_targets


def settle_targets(config: PeftConfig, model: nn.Module, **kwargs: Any) -> None:
    """Say in a configuration, in place, which layers it adapts where it names none."""
    _leave_out_attention(config, model)
    if config.target_modules is not None:
        return
    try:
        config.target_modules = default_targets(model, **kwargs)
    except ValueError:
        if not config.target_parameters:
            raise
        return
    refuse_idle_layers(config)
    log_targets(model, **kwargs)


def default_targets(model: nn.Module, **kwargs: Any) -> set[str] | str:
    """Return what to adapt, as `target_modules` says it: names, each as short as can be."""
    targets = {name for name, reason in survey(model, **kwargs).items() if not reason}
    if not targets:
        raise ValueError(
            f"Please specify `target_modules` in `peft_config`: {type(model).__name__} has no "
            f"repeated blocks with linear layers that could be the default. "
            f"{available_targets(model)}"
        )
    modules = own_modules(model)
    root = _language_model(modules)
    others = {name.removeprefix(root) for name in modules if name.startswith(root)}
    targets = {name.removeprefix(root) for name in targets}
    names: set[str] = _find_minimal_target_modules(targets, others - targets)
    if not root:
        return names
    return rf"{re.escape(root)}(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(names)))})"


def log_targets(model: nn.Module, **kwargs: Any) -> None:
    """Say which layers the default adapts, once for equal models."""
    reasons = survey(model, **kwargs)
    counts = Counter(_last_word(name) for name, reason in reasons.items() if not reason)
    left_out = sorted({_last_word(name) for name, reason in reasons.items() if reason} - {""})
    log_once(
        f"`target_modules` is not set: PaCA adapts the {counts.total()} linear layers in the "
        f"blocks of {type(model).__name__} "
        f"({', '.join(f'{count} x {name}' for name, count in sorted(counts.items()))}); "
        f"it leaves out {', '.join(left_out) or 'nothing'}."
    )


def _leave_out_attention(config: PeftConfig, model: nn.Module) -> None:
    """Exclude from "all-linear" the layers that torch's attention never calls, and say so."""
    if str(config.target_modules).lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    names = {n for n, m in model.named_modules() if isinstance(m, TORCHS_ATTENTION)}
    if not names:
        return
    if isinstance(config.exclude_modules, str):
        config.exclude_modules = "|".join([config.exclude_modules, *map(re.escape, sorted(names))])
    else:
        config.exclude_modules = names.union(config.exclude_modules or ())
    log_once(f"`target_modules` (all-linear): {sorted(names)} left out: {NEVER_CALLED}.")


def survey(model: nn.Module, **kwargs: Any) -> dict[str, str]:
    """Return every module with a weight matrix, and why the default leaves it out."""
    modules = own_modules(model)
    blocks = tuple(f"{name}." for name in modules if _is_block(name, modules))
    root = _language_model(modules)
    reasons = {}
    for name, module in modules.items():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        kind = adaptable_kind(base, **kwargs)
        if kind is None and not _has_matrix(base):
            continue
        if isinstance(base, TORCHS_ATTENTION):
            reasons[name] = "torch's MultiheadAttention"
        elif kind not in (Layout, Conv1DLayout):
            reasons[name] = "bare parameters" if kind is None else kind.word
        elif not name.startswith(blocks):
            reasons[name] = "outside the blocks"
        elif not name.startswith(root):
            reasons[name] = "beside the language model"
        else:
            reasons[name] = _reason_in_block(modules[name.rpartition(".")[0]])
    return reasons


def _language_model(modules: dict[str, Any]) -> str:
    """Return what the names in the language model of a multimodal one start with, else ""."""
    names = (name for name in modules if _last_word(name) == "language_model")
    return "".join(f"{name}." for name in itertools.islice(names, 1))


def _is_block(name: str, modules: dict[str, Any]) -> bool:
    """Whether a module is an element of a list of modules that have children of their own."""
    module, parent = modules[name], modules.get(name.rpartition(".")[0])
    return (
        name != ""
        and isinstance(parent, (nn.ModuleList, nn.Sequential))
        and not isinstance(module, BaseTunerLayer)
        and any(True for _ in module.children())
    )


def _has_matrix(module: nn.Module) -> bool:
    return any(p is not None and p.squeeze().dim() > 1 for p in module._parameters.values())


def _reason_in_block(parent: nn.Module) -> str:
    if hasattr(parent, "experts"):
        return "router"
    if hasattr(parent, "A_log") and hasattr(parent, "D"):
        return "state-space mixer"
    return ""


def _last_word(name: str) -> str:
    return name.rpartition(".")[2]


@functools.cache
def log_once(message: str) -> None:
    """Say something about a model, once in a process."""
    # A warning, because what is trained should be seen without setting up logging.
    logging.getLogger(__name__).warning(message)
