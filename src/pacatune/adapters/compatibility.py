"""Decide whether an adapter belongs to a base model, before it changes a single number."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pacatune.adapters.fingerprint import (
    differing_modules,
    fingerprint,
    unwrap,
)
from pacatune.adapters.folder import FINGERPRINT_KEY, SIDECAR_NAME, Adapter, read_adapter
from pacatune.adapters.target import find_target, target_shape
from pacatune.checks import PEFT_PREFIX, ColumnUpdate
from pacatune.tuner.experts import is_expert_parameter

_OTHER_BASE = "pass `allow_other_base` (--allow-other-base) if this base is meant."


def check_base(
    adapter: str | Path | Adapter, model: nn.Module, *, allow_other_base: bool = False
) -> list[str]:
    """Refuse a base model that the adapter was not trained on.

    Names and shapes of the adapted modules must fit. Beyond that the fingerprint decides, which
    training stores with the adapter; without one, the name of the base.

    Args:
        adapter: A PaCA adapter or its folder.
        model: The base, or a PEFT model around it; on the meta device weights are not compared.
        allow_other_base: Report a base of other weights or name as a note instead of an error.

    Returns:
        Notes for the user: what could not be checked, or was let through.

    Raises:
        ValueError: If a module is missing or of another shape, or the base is another one.
    """
    if not isinstance(adapter, Adapter):
        adapter = read_adapter(adapter)
    model = unwrap(model)
    check_shapes(adapter.modules, model, source=str(adapter.folder))
    _check_extra(adapter, model)
    problem, notes = _compare(adapter, model)
    if problem and not allow_other_base:
        raise ValueError(f"{adapter.folder}: {problem}; choose the right base, or {_OTHER_BASE}")
    return [problem, *notes] if problem else notes


def check_shapes(modules: Mapping[str, ColumnUpdate], model: nn.Module, *, source: str) -> None:
    """Refuse a base model without the adapted modules, or with other sizes of them.

    Args:
        modules: The adapter's tensors by module.
        model: The base, weights not needed.
        source: Where the adapter comes from, for the error.

    Raises:
        ValueError: At the first module that does not fit.
    """
    for name, (delta, indices) in modules.items():
        shape = target_shape(model, name)
        if shape is None:
            found = dict(model.named_modules())
            nearest = difflib.get_close_matches(name, found, n=1, cutoff=0)
            problem = "no module" if name not in found else "no adaptable layer"
            raise ValueError(
                f"{source}: the base ({type(model).__name__}) has {problem} {name!r}; the nearest "
                f"name is {nearest[0]!r}. The adapter belongs to another base."
            )
        out_features, in_features, *others = shape
        if list(delta.shape[2:]) != others:
            target = find_target(model, name)
            is_expert = target is not None and is_expert_parameter(*target)
            what = "experts" if is_expert else "a kernel of"
            raise ValueError(
                f"{source}: module {name!r} has {what} {tuple(delta.shape[2:])} in the adapter but "
                f"{tuple(others)} in the base; the adapter belongs to another base."
            )
        if delta.shape[0] != out_features:
            raise ValueError(
                f"{source}: module {name!r} has out_features = {delta.shape[0]} in the adapter but "
                f"{out_features} in the base; the adapter belongs to another base."
            )
        if int(indices[-1]) >= in_features:
            raise ValueError(
                f"{source}: module {name!r} adapts column {int(indices[-1])} but the base has "
                f"in_features = {in_features}; indices must be below it. The adapter is damaged or "
                "belongs to another base."
            )


def _check_extra(adapter: Adapter, model: nn.Module) -> None:
    # PEFT passes over a tensor that it has no place for, and the model is silently not the trained.
    parameters = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for key, tensor in adapter.extra.items():
        name = key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        if name.endswith(".token_adapter.trainable_tokens_delta"):
            continue
        if name not in parameters:
            raise ValueError(
                f"{adapter.folder}: the base ({type(model).__name__}) has no parameter {name!r} "
                "that the adapter brings; the adapter belongs to another base or head."
            )
        if parameters[name].shape != tensor.shape and not _is_packed(parameters[name]):
            raise ValueError(
                f"{adapter.folder}: {name!r} is {tuple(tensor.shape)} in the adapter but "
                f"{tuple(parameters[name].shape)} in the base; the adapter belongs to another base "
                "or the vocabulary was changed."
            )


def _compare(adapter: Adapter, model: nn.Module) -> tuple[str, list[str]]:
    stored = adapter.sidecar.get(FINGERPRINT_KEY)
    if stored is None:
        problem = _compare_names(adapter, model)
        return problem, ["the adapter has no fingerprint; only names and shapes could be compared."]
    _check_fingerprint(stored, adapter.folder / SIDECAR_NAME)
    columns = {name: update.indices for name, update in adapter.modules.items()}
    current = fingerprint(model, columns)
    for key in ("model_type", "hidden_size", "num_hidden_layers"):
        if key in stored and key in current and stored[key] != current[key]:
            return (
                f"it was trained on a base with `{key}` = {stored[key]!r} but this one has "
                f"{current[key]!r}"
            ), []
    differing, num_compared = differing_modules(stored["modules"], current["modules"])
    if differing:
        return (
            f"the weights of {len(differing)} of {num_compared} adapted modules are not those it "
            f"was trained on, first {differing[0]!r}"
        ), []
    notes = []
    is_loaded = not any(parameter.is_meta for parameter in model.parameters())
    if num_compared < len(columns) and is_loaded:
        notes.append(
            f"{len(columns) - num_compared} of {len(columns)} adapted modules could not be "
            "compared by weight (quantised, sharded, or in another 16-bit dtype)."
        )
    return "", notes


def _compare_names(adapter: Adapter, model: nn.Module) -> str:
    expected = adapter.config.base_model_name_or_path
    config = getattr(model, "config", None)
    given = getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None)
    if not expected or not given or _last_part(expected) == _last_part(given):
        return ""
    return (
        f"it names the base {expected!r} but this one is {given!r}, and it has no fingerprint to "
        "tell them apart"
    )


def _last_part(name: str) -> str:
    return Path(name.replace("\\", "/")).name.lower()


def _check_fingerprint(stored: Any, path: Path) -> None:
    modules = stored.get("modules") if isinstance(stored, dict) else None
    if not isinstance(modules, dict) or not all(
        isinstance(hashes, dict) and all(isinstance(value, str) for value in hashes.values())
        for hashes in modules.values()
    ):
        raise ValueError(
            f"{path}: `{FINGERPRINT_KEY}` must be an object with `modules`, hashes by dtype and "
            "module; it is damaged. Remove the file to go without."
        )


def _is_packed(parameter: Tensor) -> bool:
    # bitsandbytes keeps a quantised weight as bytes in a shape of its own.
    return not parameter.is_floating_point()
