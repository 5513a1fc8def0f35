"""Options of an adapter's configuration that match nothing: PEFT ignores them, we refuse them."""

import copy
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any, cast

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pacatune.names import guess

# PEFT adds both to `modules_to_save` of classifiers, which have one of them.
_HEADS = ("classifier", "score")


def put_adapter(model: nn.Module, config: PeftConfig) -> nn.Module:
    """Put an adapter of any PEFT method on a model, in place, to train or measure it.

    The model may have no weights. An option that matches nothing is a ValueError.
    """
    options: Any = copy.deepcopy(config)
    is_empty = any(parameter.is_meta for parameter in model.parameters())
    if is_empty and options.peft_type == "PACA":
        options.columns_from = "dequantized"
        if options.columns is None:
            options.selection = "random"
    base: Any = model
    with warnings.catch_warnings():
        # What PEFT warns of, and more, is refused below.
        for message in (
            "The following (rank|alpha)_pattern keys",
            "You have passed exclude_modules",
        ):
            warnings.filterwarnings("ignore", message)
        adapted: Any = get_peft_model(base, options, low_cpu_mem_usage=is_empty)
    _refuse_ignored(adapted)
    for layer in adapted.modules():
        if isinstance(layer, _BatchNorm):  # saved for its statistics, if at all
            layer.requires_grad_(False)
    return cast(nn.Module, adapted)


def _refuse_ignored(adapted: PeftModel) -> None:
    config, tuner = adapted.active_peft_config, adapted.base_model
    refuse_unused_patterns(config, [*tuner.targeted_module_names, *tuner.targeted_parameter_names])
    names = own_modules(adapted.get_base_model())
    for option in ("target_modules", "exclude_modules", "modules_to_save"):
        given = getattr(config, option, None) or ()
        if isinstance(given, str):
            if option == "exclude_modules" and not any(re.fullmatch(given, name) for name in names):
                raise ValueError(
                    f"`{option}` ({given!r}) matches no module, so nothing would be left out; "
                    f"{_near(given, names)}"
                )
            continue
        for one in sorted(set(given) - set(_HEADS)):
            if not any(f".{name}".endswith(f".{one}") for name in names):
                raise ValueError(
                    f"`{option}` names {one!r}, which matches no module, so it would be ignored; "
                    f"{_near(one, names)}"
                )


def refuse_unused_patterns(config: PeftConfig, adapted: Collection[str]) -> None:
    """Refuse ranks, alphas and layers for nothing that is adapted."""
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, option, None) or {}
        used = {get_pattern_key(patterns, name) for name in adapted} if patterns else set()
        for pattern in sorted(patterns.keys() - used):
            found = [name for name in adapted if get_pattern_key([pattern], name) == pattern]
            if found:
                other = get_pattern_key(patterns, found[0])
                raise ValueError(
                    f"`{option}`: {pattern!r} is never used, since {other!r}, which comes before "
                    "it, matches the same modules; put it first."
                )
            raise ValueError(
                f"`{option}`: {pattern!r} matches nothing that is adapted, so it would be ignored; "
                f"{_near(pattern, adapted)}"
            )
    layers: Any = getattr(config, "layers_to_transform", None)
    numbers = {int(number) for name in adapted for number in re.findall(r"\.(\d+)\.", name)}
    missing = set([layers] if isinstance(layers, int) else layers or ()) - numbers
    if missing and numbers:
        raise ValueError(
            f"`layers_to_transform`: {sorted(missing)} are no layers with targets, so they would "
            f"be ignored; with the others, the adapted layers are {sorted(numbers)}."
        )


def own_modules(model: nn.Module) -> dict[str, Any]:
    """Return the model's own modules by name, without what PEFT put into them."""
    modules: dict[str, Any] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name.startswith(inside):
            modules[name] = module
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                inside += (f"{name}.",)
    return modules


def _near(pattern: str, names: Iterable[str]) -> str:
    """Say which last part of a name is nearest, and list them all."""
    kinds = Counter(last for name in names if not (last := name.rpartition(".")[2]).isdigit())
    all_kinds = ", ".join(sorted(filter(None, kinds)))
    return f"{guess(pattern.rpartition('.')[2], kinds)}There are {all_kinds}."
