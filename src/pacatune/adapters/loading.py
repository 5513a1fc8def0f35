"""Load a language model for inference: base, tokenizer, quantisation, adapter."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pacatune.adapters.attach import attach
from pacatune.adapters.base import DTypeName, base_name, find_tokenizer, load_base, load_base_config
from pacatune.adapters.folder import Adapter, LoraAdapter, open_adapter
from pacatune.installation import install_command

QUANTIZATIONS = ("nf4", "fp4", "int8")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model that is ready to be asked."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    """Folder or hub id of the base."""
    adapter: Adapter | LoraAdapter | None
    notes: list[str]
    """What the user should know about base and adapter."""


def load_language_model(
    model: str | None,
    adapter: str | Path | None = None,
    *,
    dtype: DTypeName = "auto",
    device: str = "cpu",
    quantization: str | None = None,
    allow_other_base: bool = False,
) -> LoadedModel:
    """Load a causal language model with its tokenizer, and its adapter if it has one.

    Args:
        model: Folder or hub id of the base; None takes the one that the adapter names.
        adapter: Folder or hub id of a PaCA, LoRA or MosLoRA adapter; None goes without.
        dtype: Of the base's weights; `auto` is the one it was saved in.
        device: Such as `cpu` or `cuda`; `auto` takes the accelerator if there is one.
        quantization: Hold the base in fewer bits: `nf4`, `fp4` or `int8`, as training does. A PaCA
            adapter that was trained so knows it, a LoRA adapter does not.
        allow_other_base: As for `check_base`.

    Raises:
        FileNotFoundError: If base or adapter are missing.
        ValueError: If the adapter is damaged or belongs to another base or another quantisation,
            or the base has no tokenizer.
    """
    if adapter is None and model is None:
        raise ValueError("`model` and `adapter` are both missing; give at least one of them.")
    checked = None if adapter is None else open_adapter(adapter)
    name = str(model) if checked is None else base_name(model, checked.config)
    tokenizer = find_tokenizer(name, None if checked is None else checked.folder)
    if tokenizer is None:
        raise ValueError(
            f"base model {name!r} has no tokenizer; put its tokenizer files into the folder."
        )
    if quantization is not None:
        _check_quantization(quantization, name)
    base = load_base(
        name,
        task_type="CAUSAL_LM",
        dtype=dtype,
        device=device,
        quantization=_base_quantization(checked, quantization),
    )
    if checked is None:
        return LoadedModel(model=base, tokenizer=tokenizer, name=name, adapter=None, notes=[])
    adapted, notes = attach(base, checked, allow_other_base=allow_other_base)
    return LoadedModel(model=adapted, tokenizer=tokenizer, name=name, adapter=checked, notes=notes)


def _check_quantization(wanted: str, base: str) -> None:
    if wanted not in QUANTIZATIONS:
        raise ValueError(
            f"`quantization` ({wanted!r}) must be one of {', '.join(QUANTIZATIONS)}, or left out."
        )
    if getattr(load_base_config(base), "quantization_config", None) is not None:
        raise ValueError(
            f"`quantization` ({wanted!r}): {base} is saved quantised already; leave it out."
        )
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"`quantization` ({wanted!r}) needs bitsandbytes; {install_command('quant')}."
        )


def _base_quantization(
    adapter: Adapter | LoraAdapter | None, wanted: str | None
) -> dict[str, Any] | None:
    """Return the quantisation as `load_base` wants it: the adapter's own, or the one asked for."""
    trained: dict[str, Any] | None = getattr(adapter and adapter.config, "base_quantization", None)
    if trained is None:
        return None if wanted is None else _bitsandbytes(wanted)
    if wanted is None:
        return trained
    if trained.get("type") != wanted:
        raise ValueError(
            f"`quantization` ({wanted!r}) is not the one that the adapter was trained on "
            f"({trained.get('type')!r}); leave it out."
        )
    return trained


def _bitsandbytes(kind: str) -> dict[str, Any]:
    if kind == "int8":
        return {"method": "bitsandbytes", "type": kind}
    return {"method": "bitsandbytes", "type": kind, "block_size": 64, "double": True}
