"""Turn a PaCA adapter into a LoRA adapter that says exactly the same, for any LoRA server.

LoRA adds scaling * B A to a weight. With A (R, I) the 0/1 matrix that selects the trained columns
and B (O, R) = delta, that is PaCA's update and nothing else.

Servers stack the factors of fused layers (q, k and v; gate and up), read one rank and one alpha for
all modules, and pass over the patterns that PEFT knows. So a module of lower rank than another is
filled up with zeros, and where alpha / rank differs, B takes the difference. Convolutions, which
those servers do not adapt, keep their own rank (export_factors.py).
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import _find_minimal_target_modules
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pacatune.adapters.base import innermost
from pacatune.adapters.export_factors import (
    convolution_notes,
    convolution_patterns,
    lora_factors,
    rounded_factor,
)
from pacatune.adapters.folder import (
    CONFIG_NAME,
    Adapter,
    is_parameter,
    module_rank,
    open_adapter,
)
from pacatune.adapters.loading import check_base
from pacatune.adapters.target import named_base
from pacatune.files.folder import check_output, staged_folder
from pacatune.files.tensor_file import write_tensors
from pacatune.format.options import format_quantization
from pacatune.format.tensors import PEFT_PREFIX, TENSORS_NAME
from pacatune.precision import torch_dtype

ExportDType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export wrote and how exact it is."""

    output: Path
    """The LoRA adapter's folder."""
    base: str
    """The base whose shapes were used."""
    num_modules: int
    """Adapted modules."""
    num_bytes: int
    """Size of the tensors."""
    rounding: float
    """Largest relative error of a factor, in the Frobenius norm; 0 in float32."""
    notes: list[str]
    """What the user should know."""


def export_lora(
    model: str | nn.Module | None,
    adapter: str | Path,
    output: str | Path,
    *,
    dtype: ExportDType = "float32",
    keep_extra: bool = False,
    allow_other_base: bool = False,
) -> ExportResult:
    """Write a PaCA adapter as a LoRA adapter of the same rank, its modules' largest.

    The base's config.json is read for its sizes, and of the adapted weights, if they are here, the
    few numbers that tell it from other bases.

    Args:
        model: Folder or hub id of the base; None takes the one that the adapter names. A base that
            transformers does not load (diffusers, timm, your own) is given itself, plain or
            adapted.
        adapter: Folder or hub id of the adapter.
        output: Folder to write, missing or empty.
        dtype: Of A and B; A is exact in each, B in float32.
        keep_extra: Carry `modules_to_save`, biases and token embeddings over. PEFT loads them,
            vLLM and most other servers do not.
        allow_other_base: As for `check_base`.

    Returns:
        The folder, its rank, size and notes for the user.

    Raises:
        FileNotFoundError: If base or adapter are missing.
        FileExistsError: If `output` is in use.
        ValueError: If the adapter is damaged, belongs to another base, or trains what LoRA servers
            do not load.
    """
    output = Path(output)
    check_output(output, num_bytes=0)
    trained, notes = _open_trained(adapter, keep_extra=keep_extra)
    name, base = named_base(model, trained)
    notes += check_base(trained, base, allow_other_base=allow_other_base)
    tensors, rounding = _lora_tensors(trained, base, torch_dtype(dtype))
    config = lora_config(trained, base, name, keep_extra=keep_extra)
    config |= convolution_patterns(tensors, config["r"], config["lora_alpha"])
    notes += [*_pattern_notes(trained), *convolution_notes(tensors), *_quantization_notes(trained)]
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    with staged_folder(output, num_bytes) as staging:
        text = json.dumps(config, indent=2, sort_keys=True)
        (staging / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        write_tensors(tensors, staging / TENSORS_NAME)
    return ExportResult(
        output=output,
        base=name,
        num_modules=len(trained.modules),
        num_bytes=num_bytes,
        rounding=rounding,
        notes=notes,
    )


def _open_trained(folder: str | Path, *, keep_extra: bool) -> tuple[Adapter, list[str]]:
    """Open an adapter, without weights of the base that it does not train, and note these."""
    adapter = open_adapter(folder)
    if not isinstance(adapter, Adapter):
        raise ValueError(
            f"{adapter.folder} is no PaCA adapter; only these become LoRA, and what is LoRA "
            "already needs no export."
        )
    copies = adapter.copies()
    extra = {name: tensor for name, tensor in adapter.extra.items() if name not in copies}
    if extra and not keep_extra:
        raise ValueError(
            f"{adapter.folder} also holds {len(extra)} tensors that are not PaCA's, first "
            f"{next(iter(extra))!r}; vLLM and most LoRA servers do not load them. Pass "
            "`keep_extra` (--keep_extra) to carry them over for PEFT, or merge the adapter instead."
        )
    notes = []
    if copies:
        notes.append(
            f"left out {len(copies)} weights of the base that it does not train, first "
            f"{copies[0]!r}."
        )
    return replace(adapter, extra=extra), notes


def lora_config(
    adapter: Adapter, base: nn.Module, name: str, *, keep_extra: bool = False
) -> dict[str, Any]:
    """Return the adapter_config.json of the LoRA adapter, with keys that any PEFT knows."""
    config: Any = adapter.config
    parameters = sorted(name for name in adapter.modules if is_parameter(config, name))
    targets = adapter.modules.keys() - set(parameters)
    rank, alpha = rank_and_alpha(adapter)
    result = {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "base_model_name_or_path": config.base_model_name_or_path or name or None,
        "revision": config.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": _exact_targets(sorted(targets), base),
        "fan_in_fan_out": any(
            isinstance(innermost(base.get_submodule(name)), Conv1D) for name in targets
        ),
        "bias": "none",
        "modules_to_save": None,
    }
    if parameters:
        result["target_parameters"] = parameters
    if getattr(config, "lora_bias", False):
        result["lora_bias"] = True
    if keep_extra:
        result["bias"] = "lora_only" if config.bias == "paca_only" else config.bias
        result["modules_to_save"] = config.modules_to_save
        if config.trainable_token_indices is not None:
            result["trainable_token_indices"] = config.trainable_token_indices
    return result


def rank_and_alpha(adapter: Adapter) -> tuple[int, int]:
    """Return the rank and the alpha that the LoRA adapter has for all of its modules.

    A module's rank is that of its update. Alpha gives the scaling of the module with the largest
    rank; if that is no whole number above 0, which some servers need, it is the rank.
    """
    config = adapter.config
    ranks = _linear_ranks(adapter) or {name: module_rank(config, name) for name in adapter.modules}
    largest = max(ranks, key=lambda name: ranks[name])
    rank, scaling = ranks[largest], adapter.scaling(largest)
    alpha = round(scaling * rank)
    return rank, alpha if alpha > 0 and alpha / rank == scaling else rank


def _lora_tensors(
    adapter: Adapter, base: nn.Module, dtype: torch.dtype
) -> tuple[dict[str, Tensor], float]:
    """Return the tensors of the LoRA adapter, and the largest relative rounding of a factor."""
    tensors, rounding = dict(adapter.extra), 0.0
    rank, alpha = rank_and_alpha(adapter)
    for name in adapter.modules:
        scaling = adapter.scaling(name)
        times = 1 if scaling == alpha / rank else scaling * rank / alpha
        for key, factor in lora_factors(adapter, base, name, times, rank).items():
            where = f"{adapter.folder}: module {name!r}"
            tensors[PEFT_PREFIX + key], error = rounded_factor(factor, dtype, where)
            rounding = max(rounding, error)
    return tensors, rounding


def _exact_targets(names: list[str], base: nn.Module) -> list[str] | str:
    # A list matches by the end of the name; full names are exact unless they end another name.
    if not names:
        return []
    others = {name for name, _ in base.named_modules()} - set(names)
    if any(other.endswith(f".{name}") for name in names for other in others):
        return "|".join(map(re.escape, sorted(names)))
    # Short names are what people write themselves, and what some servers compare with a list.
    return sorted(_find_minimal_target_modules(names, others))


def _linear_ranks(adapter: Adapter) -> dict[str, int]:
    """Return the ranks of all modules but convolutions."""
    return {
        name: update.rank
        for name, update in adapter.modules.items()
        if len(update.dense_shape) == 2 or is_parameter(adapter.config, name)
    }


def _pattern_notes(adapter: Adapter) -> list[str]:
    rank, alpha = rank_and_alpha(adapter)
    notes = []
    if num_padded := sum(other < rank for other in _linear_ranks(adapter).values()):
        notes.append(f"{num_padded} modules of lower rank are filled up with zeros to {rank}.")
    if num_scaled := sum(adapter.scaling(name) != alpha / rank for name in adapter.modules):
        notes.append(
            f"{num_scaled} modules with another alpha / rank than {alpha} / {rank} have the "
            "difference in B."
        )
    return notes


def _quantization_notes(adapter: Adapter) -> list[str]:
    if adapter.config.base_quantization is None:
        return []
    base = f"a base quantised as {format_quantization(adapter.config.base_quantization)!r}"
    if adapter.config.columns_from == "original":
        return [f"its columns start from the original weights: right on {base}, and on no other."]
    return [f"trained on {base}: serve it there; elsewhere outputs differ by that rounding."]
