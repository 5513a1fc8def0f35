"""Turn a PaCA adapter into a LoRA adapter that says exactly the same, for any LoRA server.

LoRA adds scaling * B A to a weight. With A (R, I) the 0/1 matrix that selects the trained columns
and B (O, R) = delta, that is PaCA's update and nothing else. MosLoRA's is A and B M.

Servers stack the factors of fused layers (q, k and v; gate and up), read one rank and one alpha for
all modules, and pass over the patterns that PEFT knows. So a module of lower rank than another is
filled up with zeros, and where alpha / rank differs, B takes the difference. Convolutions, which
those servers do not adapt, keep their own rank (export_factors.py).
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import _find_minimal_target_modules
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pacatune.adapters.base import (
    innermost,
    load_base,
    load_tokenizer,
    named_base,
    num_labels_of,
    quantization_config,
)
from pacatune.adapters.export_factors import (
    convolution_notes,
    convolution_patterns,
    lora_factors,
    rounded_factor,
)
from pacatune.adapters.export_moslora import FoldedAdapter, fold_mixers
from pacatune.adapters.folder import (
    CONFIG_NAME,
    Adapter,
    LoraAdapter,
    is_parameter,
    module_rank,
    open_adapter,
)
from pacatune.adapters.loading import attach, check_base
from pacatune.adapters.probe import (
    OutputError,
    check_outputs,
    output_error,
    output_size,
    probe_inputs,
    run_probe,
)
from pacatune.files.folder import check_output, staged_folder
from pacatune.files.tensor_file import write_tensors
from pacatune.format.options import format_quantization, target_of
from pacatune.format.tensors import PEFT_PREFIX, TENSORS_NAME
from pacatune.precision import torch_dtype
from pacatune.tuner.quantized import Quantization

# Two processes, perhaps on two devices, sum in another order.
_ARITHMETIC = 1e-4
_FACTOR = 4
_SCRIPT = Path(__file__).with_name("plain_peft.py")


def compare_with_plain_peft(
    base: str,
    adapter: Adapter | LoraAdapter,
    lora_folder: Path,
    dtype: str,
    device: str = "cpu",
    allow_other_base: bool = False,
) -> tuple[OutputError, float]:
    """Compare the outputs of a LoRA adapter in plain PEFT with those of its original.

    Both run in float32, on the inputs of `probe_inputs` and on the base that the adapter was
    trained on: quantised, where that can be repeated. Returns the difference, and the largest
    absolute one that is allowed: float32's own of the outputs, and the rounding of the factors to
    `dtype` of what the adapter changes, but no more than half of that.
    """
    quantization, num_labels = _repeatable(adapter), num_labels_of(base, adapter)
    model = load_base(
        base,
        task_type=adapter.config.task_type,
        dtype="float32",
        device=device,
        quantization=quantization,
        num_labels=num_labels,
    )
    model_class = type(model).__name__
    inputs = probe_inputs(model, load_tokenizer(base))
    plain = run_probe(model, inputs)
    peft_model, _ = attach(model, adapter, allow_other_base=allow_other_base)
    reference = run_probe(peft_model, inputs)
    del model, peft_model  # the other process needs the memory for its own copy
    outputs = _run_plain_peft(base, model_class, lora_folder, inputs, quantization, num_labels)
    error = output_error(reference, outputs)
    effect = output_error(plain, reference).max_absolute
    limit = check_outputs(
        error,
        export_limit(reference, effect, dtype),
        effect,
        whose="plain PEFT's",
        dtype=dtype,
        fix="Export in more bits (--dtype float32), or go without --verify.",
    )
    return error, limit


def export_limit(reference: list[Tensor], effect: float, dtype: str) -> float:
    """Return the largest absolute difference that rounding the factors to `dtype` explains.

    `effect` is the adapter's largest absolute change of the outputs, `reference`.
    """
    rounding = _FACTOR * torch.finfo(torch_dtype(dtype)).eps * effect
    return _ARITHMETIC * output_size(reference) + rounding


def _repeatable(adapter: Adapter | LoraAdapter) -> Quantization | None:
    """Return how to quantise the base; None where the adapter is as right on a plain one."""
    if isinstance(adapter, LoraAdapter) or adapter.config.base_quantization is None:
        return None
    quantization = adapter.config.base_quantization
    try:
        quantization_config(quantization, torch.float32)
    except ValueError:
        if adapter.config.columns_from == "original":
            raise
        return None
    return quantization


def _run_plain_peft(
    base: str,
    model_class: str,
    lora_folder: Path,
    inputs: list[dict[str, Tensor]],
    quantization: Quantization | None = None,
    num_labels: int | None = None,
) -> list[Tensor]:
    with tempfile.TemporaryDirectory() as scratch:
        for number, batch in enumerate(inputs):
            save_file(batch, Path(scratch) / f"input-{number}.safetensors")
        job = {
            "base": base,
            "model_class": model_class,
            "adapter": str(lora_folder.absolute()),
            "scratch": scratch,
            "num_batches": len(inputs),
            "options": {} if num_labels is None else {"num_labels": num_labels},
            "quantization": quantization
            and quantization_config(quantization, torch.float32).to_dict(),
        }
        # -P: otherwise the script's own folder comes first, and its inspect.py hides Python's.
        command = [sys.executable, "-P", str(_SCRIPT), json.dumps(job)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            last_line = (finished.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(
                f"plain PEFT cannot load the exported adapter ({last_line}); nothing was written. "
                "If memory ran out, go without: `verify=False`."
            )
        outputs = load_file(Path(scratch) / "outputs.safetensors")
    return [outputs[str(number)] for number in range(len(inputs))]


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
    error: OutputError | None
    """Outputs in plain PEFT against PaCA's, both in float32; None if not verified."""
    limit: float | None
    """Largest absolute difference that was allowed; None if not verified."""
    notes: list[str]
    """What the user should know."""


def export_lora(
    model: str | nn.Module | None,
    adapter: str | Path,
    output: str | Path,
    *,
    dtype: ExportDType = "float32",
    keep_extra: bool = False,
    verify: bool = False,
    device: str = "cpu",
    allow_other_base: bool = False,
) -> ExportResult:
    """Write a PaCA or MosLoRA adapter as a LoRA adapter of the same rank, its modules' largest.

    Only the base's config.json is read, for the number of in_features, unless `verify` is set.

    Args:
        model: Folder or hub id of the base; None takes the one that the adapter names. A base that
            transformers does not load (diffusers, timm, your own) is given itself, plain or
            adapted.
        adapter: Folder or hub id of the adapter.
        output: Folder to write, missing or empty.
        dtype: Of A and B; A is exact in each, B in float32.
        keep_extra: Carry `modules_to_save`, biases and token embeddings over. PEFT loads them,
            vLLM and most other servers do not.
        verify: Load the result with PEFT alone in a new process and compare outputs; for a base
            with a name.
        device: Where to compute the outputs of the PaCA model for that.
        allow_other_base: As for `check_base`.

    Raises:
        FileNotFoundError: If base or adapter are missing.
        FileExistsError: If `output` is in use.
        ValueError: If the adapter is damaged, belongs to another base, or trains what LoRA servers
            do not load, or if the outputs differ by more than rounding.
    """
    output = Path(output)
    check_output(output, num_bytes=0)
    if verify and isinstance(model, nn.Module):
        raise ValueError(
            "`verify` loads the base in a new process, which has no model that is given itself; "
            "give its folder or hub id, or go without `verify`."
        )
    opened = open_adapter(adapter)
    found = opened if isinstance(opened, Adapter) else fold_mixers(opened)
    if found.extra and not keep_extra:
        method = "PaCA" if isinstance(found, Adapter) else "MosLoRA"
        raise ValueError(
            f"{found.folder} also holds {len(found.extra)} tensors that are not {method}'s, first "
            f"{next(iter(found.extra))!r}; vLLM and most LoRA servers do not load them. Pass "
            "`keep_extra` (--keep-extra) to carry them over for PEFT, or merge the adapter instead."
        )
    name, base = named_base(model, found)
    if isinstance(found, Adapter):
        notes = check_base(found, base, allow_other_base=allow_other_base)
    else:
        notes = found.check_base(base)
    tensors, rounding = _lora_tensors(found, base, torch_dtype(dtype))
    config = lora_config(found, base, name, keep_extra=keep_extra)
    config |= convolution_patterns(tensors, config["r"], config["lora_alpha"])
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    error = limit = None
    with staged_folder(output, num_bytes) as staging:
        text = json.dumps(config, indent=2, sort_keys=True)
        (staging / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        write_tensors(tensors, staging / TENSORS_NAME)
        if verify:
            error, limit = compare_with_plain_peft(
                name, found, staging, dtype, device, allow_other_base
            )
    return ExportResult(
        output=output,
        base=name,
        num_modules=len(found.modules),
        num_bytes=num_bytes,
        rounding=rounding,
        error=error,
        limit=limit,
        notes=[
            *notes,
            *_pattern_notes(found),
            *convolution_notes(tensors),
            *_quantization_notes(found),
        ],
    )


def lora_config(
    adapter: Adapter | FoldedAdapter, base: nn.Module, name: str, *, keep_extra: bool = False
) -> dict[str, Any]:
    """Return the adapter_config.json of the LoRA adapter, with keys that any PEFT knows."""
    config: Any = adapter.config
    parameters = sorted(name for name in adapter.modules if is_parameter(config, name))
    targets = {target_of(name) for name in adapter.modules.keys() - set(parameters)}
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


def rank_and_alpha(adapter: Adapter | FoldedAdapter) -> tuple[int, int]:
    """Return the rank and the alpha that the LoRA adapter has for all of its modules.

    A module's rank is its number of columns, with a pattern all that row groups draw from. Alpha
    gives the scaling of the module with the largest rank; if that is no whole number above 0, which
    some servers need, it is the rank.
    """
    config = adapter.config
    ranks = _linear_ranks(adapter) or {name: module_rank(config, name) for name in adapter.modules}
    largest = max(ranks, key=lambda name: ranks[name])
    rank, scaling = ranks[largest], adapter.scaling(largest)
    alpha = round(scaling * rank)
    return rank, alpha if alpha > 0 and alpha / rank == scaling else rank


def _lora_tensors(
    adapter: Adapter | FoldedAdapter, base: nn.Module, dtype: torch.dtype
) -> tuple[dict[str, Tensor], float]:
    """Return the tensors of the LoRA adapter, and the largest relative rounding of a factor."""
    tensors, rounding = dict(adapter.extra), 0.0
    rank, alpha = rank_and_alpha(adapter)
    for name in adapter.modules:
        scaling = adapter.scaling(name)
        times = 1 if scaling == alpha / rank else scaling * rank / alpha
        if isinstance(adapter, Adapter):
            factors = lora_factors(adapter, base, name, times, rank)
        else:
            factors = adapter.factors(name, times, rank)
        for key, factor in factors.items():
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


def _linear_ranks(adapter: Adapter | FoldedAdapter) -> dict[str, int]:
    """Return the ranks of all modules but convolutions."""
    if isinstance(adapter, FoldedAdapter):
        return {name: module_rank(adapter.config, name) for name in adapter.modules}
    return {
        name: len(update.indices)
        for name, update in adapter.modules.items()
        if update.delta.ndim == 2 or is_parameter(adapter.config, name)
    }


def _pattern_notes(adapter: Adapter | FoldedAdapter) -> list[str]:
    rank, alpha = rank_and_alpha(adapter)
    notes = []
    if isinstance(adapter, Adapter) and (groups := adapter.config.groups) > 1:
        own = max(update.rank for update in adapter.modules.values())
        notes.append(
            f"{groups} row groups of {own} columns: as LoRA the rank is {rank}, the columns that "
            f"they draw from (`pool`), and B holds {rank / own:.1f} times the numbers, the others "
            "zeros. A server must allow that rank, vLLM up to 512."
        )
    if num_padded := sum(other < rank for other in _linear_ranks(adapter).values()):
        notes.append(f"{num_padded} modules of lower rank are filled up with zeros to {rank}.")
    if num_scaled := sum(adapter.scaling(name) != alpha / rank for name in adapter.modules):
        notes.append(
            f"{num_scaled} modules with another alpha / rank than {alpha} / {rank} have the "
            "difference in B."
        )
    return notes


def _quantization_notes(adapter: Adapter | FoldedAdapter) -> list[str]:
    if not isinstance(adapter, Adapter) or adapter.config.base_quantization is None:
        return []
    base = f"a base quantised as {format_quantization(adapter.config.base_quantization)!r}"
    if adapter.config.columns_from == "original":
        return [f"its columns start from the original weights: right on {base}, and on no other."]
    return [f"trained on {base}: serve it there; elsewhere outputs differ by that rounding."]
