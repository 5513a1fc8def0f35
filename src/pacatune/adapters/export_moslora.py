"""Turn a MosLoRA adapter into a LoRA adapter that says the same: B M in place of B.

As for PaCA, servers must need no patterns: modules of lower rank are filled up with zeros, and
where the scale differs from the one of the file, B takes the difference.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pacatune.adapters.base import innermost, named_base
from pacatune.adapters.export_factors import (
    ExportPlan,
    plain_lora_config,
    refuse_extra,
    rounded_factor,
)
from pacatune.adapters.folder import LoraAdapter, find_tensors, open_adapter
from pacatune.files.tensor_file import read_tensors
from pacatune.format.tensors import PEFT_PREFIX
from pacatune.tuner.moslora import MosLoraConfig

_A, _B, _MIXER, _BIAS = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_mixer.weight",
    ".lora_B.bias",
)


def plan_moslora(
    folder: Path, model: str | nn.Module | None, dtype: torch.dtype, *, keep_extra: bool
) -> ExportPlan:
    """Read a MosLoRA adapter and fold its mixers."""
    adapter, tensors = _read(folder)
    extra = sorted(key for key in tensors if not re.search(r"\.lora_(A|B|mixer)\.", key))
    if not keep_extra:
        refuse_extra(folder, extra, "MosLoRA")
    name, base = named_base(model, adapter)
    config = _folded_config(adapter, tensors, base, name)
    folded, rounding = _folded_tensors(adapter, tensors, dtype)
    return ExportPlan(
        adapter=adapter,
        base=name,
        num_modules=len(_modules_of(tensors)),
        config=config,
        tensors=folded,
        rounding=rounding,
        notes=["the mixer of each module is folded into its B; training cannot be resumed here."],
    )


def _read(folder: str | Path) -> tuple[LoraAdapter, dict[str, Tensor]]:
    """Read and check a MosLoRA adapter."""
    adapter = open_adapter(folder)
    assert isinstance(adapter, LoraAdapter), "the caller has looked"
    tensors = read_tensors(find_tensors(adapter.folder))
    names = _modules_of(tensors)
    if not names:
        raise ValueError(f"{adapter.folder} holds no `lora_mixer`; save the adapter again.")
    for name in names:
        keys = [name + part for part in (_B, _MIXER, _A) if name + part in tensors]
        shapes = [tuple(tensors[key].shape) for key in keys]
        rank = _rank(adapter.config, name.removeprefix(PEFT_PREFIX))
        fits = len(shapes) == 3 and all(len(shape) == 2 for shape in shapes)
        if not fits or not shapes[0][1] == shapes[1][0] == shapes[1][1] == shapes[2][0] == rank:
            raise ValueError(
                f"{adapter.folder}: module {name!r} must have lora_B (O, {rank}), lora_mixer "
                f"({rank}, {rank}) and lora_A ({rank}, I), and has {shapes}; the file is "
                "incomplete or of another run."
            )
    return adapter, tensors


def _modules_of(tensors: dict[str, Tensor]) -> list[str]:
    """Return the names in the file of all modules that have a part of an update."""
    parts = (_A, _B, _MIXER)
    found = {key.removesuffix(part) for part in parts for key in tensors if key.endswith(part)}
    return sorted(found)


def _folded_tensors(
    adapter: LoraAdapter, tensors: dict[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], float]:
    """Return the tensors of the LoRA adapter, and the largest relative rounding of a factor."""
    result, rounding = dict(tensors), 0.0
    config: MosLoraConfig = adapter.config
    rank, alpha = _rank_and_alpha(config, tensors)
    for name in _modules_of(tensors):
        factor = _scaling(config, name.removeprefix(PEFT_PREFIX)) * rank / alpha
        product = result.pop(name + _B).double() @ result.pop(name + _MIXER).double()
        parts = {_A: result.pop(name + _A).double(), _B: product * factor}
        if name + _BIAS in result:
            parts[_BIAS] = result.pop(name + _BIAS).double() * factor
        missing = rank - len(parts[_A])
        parts[_A] = nn.functional.pad(parts[_A], (0, 0, 0, missing))
        parts[_B] = nn.functional.pad(parts[_B], (0, missing))
        for part, exact in parts.items():
            where = f"{adapter.folder}: module {name!r}"
            result[name + part], error = rounded_factor(exact, dtype, where)
            rounding = max(rounding, error)
    return result, rounding


def _folded_config(
    adapter: LoraAdapter, tensors: dict[str, Tensor], base: nn.Module, name: str
) -> dict[str, Any]:
    """Return the adapter_config.json of the LoRA adapter, with keys that any PEFT knows."""
    config: MosLoraConfig = adapter.config
    rank, alpha = _rank_and_alpha(config, tensors)
    names = [key.removeprefix(PEFT_PREFIX) for key in _modules_of(tensors)]
    targets = config.target_modules
    return plain_lora_config(config, name, rank, alpha) | {
        "target_modules": targets if isinstance(targets, str) else sorted(targets or []),
        "exclude_modules": _plain(config.exclude_modules),
        "layers_to_transform": config.layers_to_transform,
        "layers_pattern": config.layers_pattern,
        "fan_in_fan_out": any(_is_conv1d(adapter, tensors, base, one) for one in names),
        "lora_bias": config.lora_bias,
        "bias": config.bias,
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
    }


def _rank_and_alpha(config: MosLoraConfig, tensors: dict[str, Tensor]) -> tuple[int, int]:
    """Return the rank and the alpha for all modules: the largest rank, and a whole number."""
    rank = max(len(tensors[name + _A]) for name in _modules_of(tensors))
    alpha = float(config.lora_alpha)
    is_whole = alpha.is_integer() and alpha > 0 and not config.use_rslora
    return rank, int(alpha) if is_whole else rank


def _is_conv1d(
    adapter: LoraAdapter, tensors: dict[str, Tensor], base: nn.Module, name: str
) -> bool:
    try:
        module: Any = innermost(base.get_submodule(name))
        shape = tuple(module.weight.shape)
    except AttributeError:
        shape, module = (), None
    is_conv1d = isinstance(module, Conv1D)
    sizes = len(tensors[PEFT_PREFIX + name + _B]), tensors[PEFT_PREFIX + name + _A].shape[1]
    if shape != (sizes[::-1] if is_conv1d else sizes):
        raise ValueError(
            f"{adapter.folder}: module {name!r} has an update of {sizes}, but the base has "
            f"{shape or 'no such module'}; it was trained on another base."
        )
    return is_conv1d


def _rank(config: Any, module: str) -> int:
    key = get_pattern_key(list(config.rank_pattern), module)
    return int(config.rank_pattern.get(key, config.r))


def _scaling(config: Any, module: str) -> float:
    key, rank = get_pattern_key(list(config.alpha_pattern), module), _rank(config, module)
    alpha = float(config.alpha_pattern.get(key, config.lora_alpha))
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value
