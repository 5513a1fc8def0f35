"""Write an adapter into its base model: a plain model folder that needs nothing of ours."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from pacatune.adapters.base import (
    DTypeName,
    MergeBase,
    base_name,
    find_tokenizer,
    labels_of,
    load_base,
    num_labels_of,
    replace_quantised,
)
from pacatune.adapters.folder import Adapter, LoraAdapter, open_adapter
from pacatune.adapters.loading import answered_warnings, attach
from pacatune.adapters.probe import (
    OutputError,
    check_outputs,
    output_error,
    output_size,
    probe_inputs,
    run_probe,
)
from pacatune.adapters.target import (
    adapted_target_columns,
    read_target_columns,
    target_of_module,
)
from pacatune.files.folder import check_output, staged_folder
from pacatune.files.journal import is_gguf
from pacatune.format.options import format_quantization
from pacatune.precision import dtype_name
from pacatune.pretrained import is_dequantised, load_config
from pacatune.tuner.compat import tied_weights
from pacatune.tuner.quantized import Quantization

_FACTOR = 4  # docs/decisions.md has what was measured.


def check_columns(model: nn.Module, expected: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Hold every merged column against what it must be, bit for bit."""
    for name, (columns, new) in expected.items():
        merged = read_target_columns(target_of_module(model, name), columns)
        if not torch.equal(merged, new):
            raise ValueError(
                f"module {name!r}: the merged columns are not W + scaling * delta in "
                f"{merged.dtype}; nothing was written. Another package may have changed PEFT."
            )


@torch.no_grad()
def rounding_limit(
    model: nn.Module, inputs: list[dict[str, Tensor]], outputs: list[Tensor]
) -> float:
    """Measure how far the outputs may be from right ones by rounding alone, absolutely.

    Every weight is moved at random within its rounding, as one more merge would, and the change of
    the outputs is taken four times: kernels that round elsewhere are as far apart as that once.
    The change is taken for a unit in the last place of the outputs at least. The model, merged and
    in the dtype that it was written in, is spoiled afterwards.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.is_floating_point():
            part = torch.rand(parameter.shape, generator=generator, device="cpu") - 0.5
            weight = parameter.double()
            parameter.copy_(
                weight + weight.abs() * torch.finfo(parameter.dtype).eps * part.to(weight)
            )
    change = output_error(outputs, run_probe(model, inputs)).max_absolute
    # Of few outputs (one score a probe) all may stay as they are by chance.
    unit = torch.finfo(next(model.parameters()).dtype).eps * output_size(outputs)
    return _FACTOR * max(change, unit)


def notes_on_change(change: float, effect: float, onto: MergeBase) -> list[str]:
    """Return what the user should know if the chosen base itself changes the outputs.

    `change` is its largest absolute one with the same adapter, `effect` that of the adapter.
    """
    if effect == 0:
        return ["the adapter changes no output of the probe: it may be untrained."]
    if change == 0:
        return []
    sizes = f"by up to {change:.1e}, the adapter by {effect:.1e}"
    if onto == "original":
        note = f"the original weights, which were not trained with, change outputs {sizes}"
        advice = "; compare the losses of this model and of one merged onto `dequantized`"
        return [f"{note}{advice if change > effect / 2 else ''}."]
    return [
        "the quantised layers round activations as well, which no merged model repeats: that "
        f"changes outputs {sizes}."
    ]


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """What a merge wrote and how it was verified."""

    output: Path
    """The model folder."""
    base: str
    """The base that was loaded."""
    onto: MergeBase
    """Whose weights the untrained ones are."""
    dtype: str
    """Dtype of the written weights, such as `bfloat16`."""
    num_modules: int
    """Modules whose columns were changed."""
    num_bytes: int
    """Size of the weights."""
    error: OutputError | None
    """The written model's outputs against the adapter's on that base; None if not verified."""
    limit: float | None
    """Largest absolute difference that was allowed; None if not verified."""
    effect: float | None
    """Largest absolute change of the outputs by the adapter; None if not verified."""
    notes: list[str]
    """What the user should know."""


def merge(
    model: str | None,
    adapter: str | Path,
    output: str | Path,
    *,
    dtype: DTypeName = "auto",
    device: str = "cpu",
    verify: bool = True,
    allow_other_base: bool = False,
    onto: MergeBase | None = None,
) -> MergeResult:
    """Merge an adapter into its base and write the result.

    PaCA's trained columns become round(W + scaling * delta) in the base's dtype; every other
    weight stays as it is. LoRA adapters are merged by PEFT. The written model is loaded
    again before it gets its name: its outputs may differ from the adapter's on the same base by
    what rounding explains (`rounding_limit`), and by no more than half of what the adapter changes.

    An adapter that was trained on a quantised base can be merged onto three bases. `dequantized`,
    its default, is the function that was trained, written in 16 bits. `original` takes whatever
    was not trained from the checkpoint before quantisation, which changes the outputs; `nf4` rounds
    every weight again.

    Args:
        model: Folder or hub id of the base; None takes the one that the adapter names.
        adapter: Folder or hub id of a PaCA or LoRA adapter.
        output: Folder to write, missing or empty.
        dtype: Dtype of the base and the result; `auto` keeps the one the base was saved in.
        device: Where to compute.
        verify: False skips that.
        allow_other_base: Merge even if the base is not the one the adapter was trained on.
        onto: The base to merge onto; None takes the adapter's default.

    Returns:
        The folder, what was merged, how far its outputs are from the adapter's, and notes.

    Raises:
        FileNotFoundError: If base or adapter are missing.
        FileExistsError: If `output` is in use.
        ValueError: If the adapter is damaged or belongs to another base, `onto` is not for it, the
            outputs differ by more than is allowed, or the disk is full.
    """
    checked = open_adapter(adapter)
    name = base_name(model, checked.config)
    output = Path(output)
    check_output(output, num_bytes=0)
    onto = _choose_base(onto, getattr(checked.config, "base_quantization", None), name)
    tokenizer = find_tokenizer(name, checked.folder)
    bases = _load_bases(name, checked, onto, dtype, device)
    inputs = probe_inputs(bases[0], tokenizer) if verify else []
    written, merged = _merge_in_memory(*bases, checked, inputs, allow_other_base, onto)
    del bases
    num_bytes = sum(parameter.nbytes for parameter in written.parameters())
    with staged_folder(output, num_bytes) as staging:
        written_dtype = dtype_name(written.dtype)
        written.save_pretrained(staging)
        del written  # or it would stay in memory beside the model that is read back
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        error = limit = None
        if verify:
            again = load_base(str(staging), task_type=checked.config.task_type, device=device)
            error, limit = _verify(again, inputs, merged, onto, written_dtype)
    return MergeResult(
        output=output,
        base=name,
        onto=onto,
        dtype=written_dtype,
        num_modules=merged.num_modules,
        num_bytes=num_bytes,
        error=error,
        limit=limit,
        effect=merged.effect if verify else None,
        notes=merged.notes,
    )


def _verify(
    written: PreTrainedModel,
    inputs: list[dict[str, Tensor]],
    merged: "_Merged",
    onto: MergeBase,
    dtype: str,
) -> tuple[OutputError, float]:
    """Refuse a written model that is another function; return its error, and what was allowed."""
    outputs = run_probe(written, inputs)
    error = output_error(merged.expected, outputs)
    is_requantised = onto == "nf4"
    fix = "--base dequantized" if is_requantised else "--dtype float32"
    limit = check_outputs(
        error,
        math.inf if is_requantised else rounding_limit(written, inputs, outputs),
        merged.effect,
        whose="the merged model's",
        dtype="nf4 again" if is_requantised else dtype,
        fix=f"Merge with {fix}, serve the adapter unmerged, or take the loss unmeasured with "
        "--no_verify.",
    )
    merged.notes.extend(notes_on_change(merged.base_change, merged.effect, onto))
    return error, limit


class _Merged(NamedTuple):
    """What a merged model is measured against."""

    num_modules: int
    expected: list[Tensor]
    """Outputs that the written model must have: the unmerged ones, on the base that is written."""
    effect: float
    base_change: float
    """How far that base alone moves the unmerged outputs."""
    notes: list[str]


def _choose_base(onto: MergeBase | None, quantization: Quantization | None, name: str) -> MergeBase:
    config = load_config(name, option="model")
    if is_gguf(name) or is_dequantised(config):
        if onto == "dequantized":
            return "original"  # as it is loaded
        raise ValueError(
            f"base model {name!r} is saved in few bits. `pacatune merge` writes PaCA's columns as "
            "codes into a copy of a local file or folder; a model in 16 bits is written by merging "
            "onto the dequantised one (--base dequantized)."
        )
    if quantization is None and onto not in (None, "original"):
        raise ValueError(
            f"`onto` ({onto!r}) is for adapters of PaCA that were trained on a quantised base, and "
            "this one was not; drop it (--base)."
        )
    onto = onto or ("original" if quantization is None else "dequantized")
    if onto == "nf4" and quantization is not None and quantization.get("type") != "nf4":
        raise ValueError(
            f"`onto` ('nf4'): the adapter's base was quantised as "
            f"{format_quantization(quantization)!r}, and would be so again; merge onto "
            "`dequantized` or `original` (--base) and quantise the result."
        )
    if onto == "original" and getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"base model {name!r} is saved quantised; merging would round every weight again. "
            "Give the original base that is not quantised, or merge onto the dequantised one "
            "(--base dequantized)."
        )
    return onto


def _load_bases(
    name: str, adapter: Adapter | LoraAdapter, onto: MergeBase, dtype: DTypeName, device: str
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """Load the base as it was trained on, and where that is wanted before quantisation."""
    quantization = getattr(adapter.config, "base_quantization", None)
    kind: dict[str, Any] = {
        "task_type": adapter.config.task_type,
        "num_labels": num_labels_of(name, adapter),
    }
    load = partial(load_base, name, dtype=dtype, device=device, **kind)
    base = load(quantization=quantization)
    base.config.update(labels_of(adapter, base.config.num_labels))
    return base, load() if onto == "original" and quantization is not None else None


def _merge_in_memory(
    base: PreTrainedModel,
    original: PreTrainedModel | None,
    adapter: Adapter | LoraAdapter,
    inputs: list[dict[str, Tensor]],
    allow_other_base: bool,
    onto: MergeBase,
) -> tuple[PreTrainedModel, _Merged]:
    plain = run_probe(base, inputs)
    peft_model, notes = attach(base, adapter, allow_other_base=allow_other_base)
    unmerged = run_probe(peft_model, inputs)
    num_modules = sum(isinstance(module, BaseTunerLayer) for module in peft_model.modules())
    expected = unmerged
    if onto == "dequantized" or original is not None:
        replace_quantised(base, original)
        quantization = getattr(adapter.config, "base_quantization", None) or {}
        # Of int8 the layers round activations too, which no merged model repeats.
        if original is not None or quantization.get("type") == "int8":
            expected = run_probe(peft_model, inputs)
    columns = {}
    if isinstance(adapter, Adapter) and onto != "nf4":
        for name in adapter.modules:
            columns[name] = adapted_target_columns(target_of_module(base, name), adapter, name)
    with answered_warnings():
        merged = cast(Any, peft_model).merge_and_unload(safe_merge=True)
    check_columns(merged, columns)
    _declare_untied(merged)
    return merged, _Merged(
        num_modules=num_modules,
        expected=expected,
        effect=output_error(plain, unmerged).max_absolute if inputs else 0.0,
        base_change=output_error(unmerged, expected).max_absolute if inputs else 0.0,
        notes=notes,
    )


def _declare_untied(model: Any) -> None:
    # An adapted lm_head no longer equals the embedding it was tied to; a configuration that still
    # says so would drop it from the file.
    tied = tied_weights(model)
    untied = [
        target
        for target, source in tied.items()
        if model.get_parameter(target) is not model.get_parameter(source)
    ]
    for target in untied:
        del tied[target]
    if untied:
        model.config.tie_word_embeddings = False
