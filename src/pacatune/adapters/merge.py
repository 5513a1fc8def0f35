"""Write an adapter into its base model: a plain model folder that needs nothing of ours."""

import hashlib
from collections.abc import Callable
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
from pacatune.adapters.target import target_of_module
from pacatune.files.folder import check_output, staged_folder
from pacatune.files.journal import is_gguf
from pacatune.format.options import format_quantization
from pacatune.ops.columns import bits, widened
from pacatune.precision import dtype_name
from pacatune.pretrained import is_dequantised, load_config
from pacatune.tuner.compat import tied_weights
from pacatune.tuner.quantized import Quantization

_NOTABLE = 0.5
"""Share of what an adapter changes that rounding may take without a note."""


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
    rounding: float | None
    """What rounding takes of the trained columns' change, as a share of its norm; None for LoRA."""
    is_verified: bool
    """Whether what was written was read back."""
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
    weight stays as it is. LoRA adapters are merged by PEFT. The written model is loaded again
    before it gets its name, and must have the bits of the merged one in every tensor.

    Args:
        model: Folder or hub id of the base; None takes the one that the adapter names.
        adapter: Folder or hub id of a PaCA or LoRA adapter.
        output: Folder to write, missing or empty.
        dtype: Dtype of the base and the result; `auto` keeps the one the base was saved in.
        device: Where to compute.
        verify: False skips reading it back.
        allow_other_base: Merge even if the base is not the one the adapter was trained on.
        onto: The base to merge onto; None takes `dequantized` if the adapter's was quantised.

    Raises:
        FileNotFoundError: If base or adapter are missing.
        FileExistsError: If `output` is in use.
        ValueError: If the adapter is damaged or belongs to another base, `onto` is not for it, a
            bit of what was written is another, or the disk is full.
    """
    checked = open_adapter(adapter)
    name, output = base_name(model, checked.config), Path(output)
    check_output(output, num_bytes=0)
    onto = _choose_base(onto, getattr(checked.config, "base_quantization", None), name)
    tokenizer = find_tokenizer(name, checked.folder)
    load = partial(load_base, task_type=checked.config.task_type, device=device)
    merged, facts = _merge_in_memory(name, checked, onto, dtype, load, allow_other_base)
    with staged_folder(output, facts["num_bytes"]) as staging:
        merged.save_pretrained(staging)
        digests = _digests(merged) if verify else {}
        del merged  # or it would stay in memory beside the model that is read back
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        if verify:
            _check_equal(digests, _digests(load(str(staging))))
    return MergeResult(output=output, base=name, onto=onto, is_verified=verify, **facts)


def _digests(model: nn.Module) -> dict[str, str]:
    """Return a hash of each tensor of a model: two models need not be in memory at once."""
    result = {}
    tensors = dict(model.named_buffers()) | model.state_dict()  # buffers that are not saved, too
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bits(tensor).numpy().data)
        result[name] = digest.hexdigest()
    return result


def _check_equal(merged: dict[str, str], again: dict[str, str]) -> None:
    """Refuse a model that is not the merged one, bit for bit, after writing and reading."""
    if others := sorted(dict(merged.items() ^ again.items())):
        raise ValueError(
            f"{len(others)} tensors of the written model, first {others[0]!r}, are not the merged "
            "ones bit for bit; nothing was written. Is the disk damaged, or has another package "
            "changed transformers? Compare with a fresh environment."
        )


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


def _merge_in_memory(
    name: str,
    adapter: Adapter | LoraAdapter,
    onto: MergeBase,
    dtype: DTypeName,
    load: Callable[..., PreTrainedModel],
    allow_other_base: bool,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the merged model, and what a `MergeResult` says of it."""
    quantization = getattr(adapter.config, "base_quantization", None)
    load = partial(load, name, dtype=dtype, num_labels=num_labels_of(name, adapter))
    base = load(quantization=quantization)
    base.config.update(labels_of(adapter, base.config.num_labels))
    original = load() if onto == "original" and quantization is not None else None
    peft_model, notes = attach(base, adapter, allow_other_base=allow_other_base)
    num_modules = sum(isinstance(module, BaseTunerLayer) for module in peft_model.modules())
    if onto == "dequantized" or original is not None:
        replace_quantised(base, original)
    columns = _trained_columns(base, adapter) if isinstance(adapter, Adapter) else {}
    with answered_warnings():
        merged: PreTrainedModel = cast(Any, peft_model).merge_and_unload(safe_merge=True)
    rounding = None
    if columns:
        rounding = _measure_rounding(merged, columns, is_exact=onto != "nf4")
        if all(torch.equal(before, after) for _, before, after in columns.values()):
            notes.append("the adapter changes no column: it may be untrained.")
    if rounding is not None and rounding > _NOTABLE:
        kind = "nf4" if onto == "nf4" else dtype_name(merged.dtype)
        fix = "--base dequantized" if onto == "nf4" else "--dtype float32"
        notes.append(
            f"rounding to {kind} takes {rounding:.0%} of what the adapter changes; {fix} keeps it."
        )
    _declare_untied(merged)
    return merged, {
        "dtype": dtype_name(merged.dtype),
        "num_modules": num_modules,
        "num_bytes": sum(parameter.nbytes for parameter in merged.parameters()),
        "rounding": rounding,
        "notes": notes,
    }


class _Columns(NamedTuple):
    """The columns of one module that an adapter changes, in float32 at least."""

    indices: Tensor
    before: Tensor
    after: Tensor
    """Before they are rounded to the dtype of the weight."""


def _trained_columns(base: nn.Module, adapter: Adapter) -> dict[str, _Columns]:
    result = {}
    for name, update in adapter.modules.items():
        target = target_of_module(base, name)
        before = widened(target.columns(update.indices))
        after = target.adapted(before, adapter, name)
        result[name] = _Columns(update.indices, before, after)
    return result


def _measure_rounding(model: nn.Module, columns: dict[str, _Columns], *, is_exact: bool) -> float:
    """Return how far merged columns are from W + scaling * delta, by what that changes; check them.

    In a weight of numbers, `is_exact`, they must be that, rounded once.
    """
    lost = changed = 0.0
    for name, (indices, before, after) in columns.items():
        merged = target_of_module(model, name).columns(indices)
        if is_exact and not torch.equal(merged, after.to(merged.dtype)):
            raise ValueError(
                f"module {name!r}: the merged columns are not W + scaling * delta in "
                f"{merged.dtype}; nothing was written. Another package may have changed PEFT."
            )
        lost += float((merged.to(after) - after).norm()) ** 2
        changed += float((after - before).norm()) ** 2
    return (lost / changed) ** 0.5 if changed else 0.0


def _declare_untied(model: Any) -> None:
    # An adapted lm_head no longer equals the embedding it was tied to; a configuration that still
    # says so would drop it from the file.
    tied = tied_weights(model)
    for target, source in list(tied.items()):
        if model.get_parameter(target) is not model.get_parameter(source):
            del tied[target]
            model.config.tie_word_embeddings = False
