"""Open an adapter folder that a stranger made, without its base model."""

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import type_validator
from torch import Tensor

from pacatune.files.json_file import read_json_object
from pacatune.files.plain import find_file
from pacatune.files.tensor_file import read_tensors
from pacatune.format.options import FILE_TYPES, PacaOptions
from pacatune.format.patterns import check_patterns, matching_key
from pacatune.format.tensors import (
    MIX,
    ROW_GROUPS_LEFT,
    TENSORS_NAME,
    ColumnUpdate,
    check_finite,
    check_tensors,
    group_tensors,
    plain_name,
    split_tensor_name,
)
from pacatune.methods import METHODS, config_class
from pacatune.names import nearest
from pacatune.pretrained import find_adapter

if TYPE_CHECKING:
    from peft import PeftConfig

CONFIG_NAME = "adapter_config.json"

# PEFT's TaskType, checked here so that a file can be read without PEFT.
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""What a base does -> the class of transformers that loads it."""


def read_config(path: Path) -> PacaOptions:
    """Read and check a PaCA adapter's adapter_config.json; refuse whatever is not PaCA's."""
    config = read_json_object(path)
    method = config.get("peft_type")
    if method not in FILE_TYPES:
        raise ValueError(
            f"{path} gives `peft_type` = {method!r}; it must be "
            f"{' or '.join(map(repr, FILE_TYPES))}. This is not a PaCA adapter."
        )
    if config.get("groups", 1) != 1:
        raise ValueError(f"{path}: `groups` {ROW_GROUPS_LEFT}")
    hints = typing.get_type_hints(PacaOptions)
    for key, value in config.items():
        if key not in hints:
            raise ValueError(_unknown_key(key, {*hints}, path))
        if key in ("paca_alpha", "alpha_pattern"):
            continue  # PacaOptions checks these, and takes whole numbers
        try:
            hint = hints[key]
            if isinstance(hint, types.UnionType):  # which huggingface_hub before 1.0 does not know
                hint = typing.Union[typing.get_args(hint)]  # noqa: UP007 (not an annotation)
            type_validator(key, value, hint)
        except TypeError as error:
            must = hints[key].__name__ if isinstance(hints[key], type) else hints[key]
            raise ValueError(
                f"{path} gives `{key}` = {str(value)[:80]!r} ({type(value).__name__}); "
                f"it must be {must}."
            ) from error
    task = config.get("task_type")
    if task is not None and task not in AUTO_CLASSES:
        raise ValueError(
            f"{path}: Invalid task type: {task[:80]!r}; use one of {', '.join(AUTO_CLASSES)}."
        )
    try:
        return PacaOptions(**config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_lora_config(path: Path) -> "PeftConfig":
    """Read the configuration of a LoRA, or of another of `METHODS` that is not PaCA.

    As far as PEFT does not check it itself. Keys of another version of PEFT are passed over while
    they are empty, so off.
    """
    config = read_json_object(path)
    method = config.get("peft_type")
    rows = [row for row in METHODS.values() if row.has_adapter and not row.is_paca]
    names = {getattr(row.config, "__name__", row.config): row for row in rows}
    names = {name.removesuffix("Config").upper(): row for name, row in names.items()}
    if method not in names:
        raise ValueError(
            f"{path} gives `peft_type` = {method!r}; only adapters of the methods PACA, "
            f"{', '.join(names)} can be loaded."
        )
    found_class = config_class(names[method])
    settable = {field.name for field in fields(found_class)} - {"runtime_config"}
    for key, value in config.items():
        if key not in settable and value:
            raise ValueError(_unknown_key(key, settable, path))
    if config.get("megatron_config"):
        raise ValueError(
            f"{path} sets `megatron_config`, which makes PEFT import a module that the file names; "
            "set it to null."
        )
    try:
        check_patterns(config)
        lora_config: PeftConfig = found_class(**{k: v for k, v in config.items() if k in settable})
        return lora_config
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _unknown_key(key: str, names: set[str], path: Path) -> str:
    near = nearest(key, names, cutoff=0)
    return (
        f"{path} holds the unknown key {key[:80]!r}; the nearest known one is {near!r}. "
        "Correct or remove it; if a newer version of pacatune or PEFT wrote it, upgrade."
    )


SIDECAR_NAME = "pacatune.json"
FINGERPRINT_KEY = "base_fingerprint"
"""In the sidecar: what identifies the base."""
HEAD_KEY = "head"
"""In the sidecar of a classifier: `id2label`, `label2id` and `pad_token_id` of its configuration. A
config.json beside an adapter would have transformers take the folder for a whole model."""

_PICKLE_NAMES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_HUB_FILES = [CONFIG_NAME, TENSORS_NAME, SIDECAR_NAME, "tokenizer*", "chat_template.jinja"]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A checked PaCA adapter in memory."""

    folder: Path
    """Where it was read from."""
    config: PacaOptions
    """Its configuration."""
    modules: dict[str, ColumnUpdate]
    """Delta and indices of each adapted module, by the module's name in the base model. The deltas
    of E experts are (O, R, E) here, so that the columns are always the second dimension."""
    extra: dict[str, Tensor]
    """All other tensors of the file by their name there: biases, `modules_to_save`, tokens."""
    sidecar: dict[str, Any]
    """What `pacatune.json` holds; empty without one."""

    def copies(self) -> list[str]:
        """Return the tensors of `extra` that nothing trains: weights of the base, as PEFT saves.

        PEFT puts them over the base's, whatever they hold.
        """
        return [name for name in self.extra if not self.config.trains(plain_name(name))]

    def scaling(self, module: str) -> float:
        """Return alpha / rank of one adapted module."""
        return module_alpha(self.config, module) / self.modules[module].rank


@dataclass(frozen=True, kw_only=True)
class LoraAdapter:
    """The checked folder of a LoRA adapter, which PEFT itself loads."""

    folder: Path
    """Where it lies."""
    config: "PeftConfig"
    """Its configuration."""


def open_adapter(folder: str | Path) -> Adapter | LoraAdapter:
    """Read and check an adapter that can be run: PaCA's in full, LoRA's as far as PEFT does not.

    Args:
        folder: A local folder or an id on the Hugging Face hub.

    Raises:
        FileNotFoundError: If the folder or one of its two files is missing.
        ValueError: If it is damaged or of another method.
    """
    folder = locate_folder(folder)
    path = find_file(folder, CONFIG_NAME)
    if read_json_object(path).get("peft_type") in FILE_TYPES:
        return read_adapter(folder)
    config = read_lora_config(path)
    tensors_path = find_tensors(folder)
    tensors = read_tensors(tensors_path)
    check_finite(tensors, source=str(tensors_path))
    return LoraAdapter(folder=folder, config=config)


def read_adapter(folder: str | Path) -> Adapter:
    """Read and check a PaCA adapter; only JSON and safetensors are opened, nothing is run.

    Args:
        folder: A local folder or an id on the Hugging Face hub.

    Raises:
        FileNotFoundError: If the folder or one of its two files is missing.
        ValueError: If anything in it is not what training writes; the message says what.
    """
    folder = locate_folder(folder)
    config = read_config(find_file(folder, CONFIG_NAME))
    path = find_tensors(folder)
    tensors = read_tensors(path)
    check_tensors(tensors, source=str(path))
    check_finite(tensors, source=str(path))
    modules = group_tensors(tensors, source=str(path))
    if not modules:
        raise ValueError(
            f"{path} holds no `paca_delta`; it is empty or belongs to another method. "
            "Save the adapter again."
        )
    modules = {name: _checked_update(u, config, name, str(path)) for name, u in modules.items()}
    extra = {name: tensor for name, tensor in tensors.items() if split_tensor_name(name) is None}
    sidecar = read_sidecar(folder)
    return Adapter(folder=folder, config=config, modules=modules, extra=extra, sidecar=sidecar)


def read_sidecar(folder: Path) -> dict[str, Any]:
    """Return what `pacatune.json` in an adapter's folder holds; empty without one."""
    exists = (folder / SIDECAR_NAME).exists()
    return read_json_object(find_file(folder, SIDECAR_NAME)) if exists else {}


def locate_folder(folder: str | Path) -> Path:
    """Return a local folder; for a hub id, the one that its files are fetched into."""
    if (path := find_adapter(folder)) is not None:
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(folder), allow_patterns=_HUB_FILES))
    except Exception as error:
        # The hub's client raises a dozen types; to a user they all mean the same.
        raise FileNotFoundError(
            f"adapter {folder!r} is neither a local folder nor a hub id that can be reached "
            f"({type(error).__name__}); check the path or the network."
        ) from error


def find_tensors(folder: Path) -> Path:
    """Return the path of the adapter's tensors; pickled ones are refused."""
    pickled = [name for name in _PICKLE_NAMES if (folder / name).exists()]
    if pickled and not (folder / TENSORS_NAME).exists():
        raise ValueError(
            f"{str(folder)!r} holds {pickled[0]} but no {TENSORS_NAME}; pickled files can run code "
            "when opened and are refused. Save the adapter with `safe_serialization=True`."
        )
    return find_file(folder, TENSORS_NAME)


def module_rank(config: "PacaOptions | PeftConfig", module: str) -> int:
    """Return the rank that the configuration gives a module, `rank_pattern` included."""
    return int(pattern_value(config.rank_pattern, module, config.r))


def module_alpha(config: PacaOptions, module: str) -> float:
    """Return the alpha that the configuration gives a module, `alpha_pattern` included."""
    return float(pattern_value(config.alpha_pattern, module, config.paca_alpha))


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first pattern that fits a module's name, else the default."""
    key = matching_key(patterns, module)
    return default if key is None else patterns[key]


def is_parameter(config: PacaOptions, name: str) -> bool:
    """Whether an adapted module is one of `target_parameters`: the fused weights of experts."""
    return any(f".{name}".endswith(f".{target}") for target in config.target_parameters or [])


def _checked_update(
    update: ColumnUpdate, config: PacaOptions, name: str, source: str
) -> ColumnUpdate:
    """Return an update with its columns second; refuse one that the configuration does not mean."""
    delta, rank = update.delta, module_rank(config, name)
    if (update.mix is None) != (config.channels is None):
        raise ValueError(
            f"{source}: module {name!r} has {'no' if update.mix is None else 'a'} `{MIX}` but the "
            f"configuration says `channels` = {config.channels}; they are of different runs."
        )
    if delta.ndim == 3 and is_parameter(config, name):
        delta = delta.permute(1, 2, 0)
        update = update._replace(delta=delta)
    if update.rank != rank:
        raise ValueError(
            f"{source}: module {name!r} has rank {update.rank} but the configuration says {rank} "
            f"(`r` = {config.r}, `rank_pattern` = {config.rank_pattern}); configuration and "
            "tensors are of different runs, or one was edited."
        )
    if delta.shape[1] != rank:
        raise ValueError(
            f"{source}: module {name!r}: `paca_delta` has shape {tuple(update.delta.shape)}, which "
            f"fits its {rank} columns only as one of `target_parameters` "
            f"({config.target_parameters}), or only as none; the configuration was changed."
        )
    return update
