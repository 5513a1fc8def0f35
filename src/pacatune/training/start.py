"""Runs that start from a finished adapter: its columns and options stay, its values go on."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from peft import PeftConfig

from pacatune.adapters.folder import (
    CONFIG_NAME,
    Adapter,
    LoraAdapter,
    locate_folder,
    read_config,
    read_lora_config,
)
from pacatune.files.json_file import read_json_object
from pacatune.files.plain import find_file
from pacatune.format.options import FILE_TYPES, format_quantization
from pacatune.methods import METHODS, adapter_config
from pacatune.selection import load_columns
from pacatune.strategies import strategies
from pacatune.training.config import RunConfig, changed


def take_options(config: RunConfig, typed: Mapping[str, Collection[str]]) -> None:
    """Fill a run's sections with its adapter's options; refuse those that contradict it.

    `typed` has the options of each section that are set, be it to their defaults.
    """
    saved = read_start(config)
    for name in METHODS[config.method].sections:
        section = getattr(config, name)
        for option in fields(section):
            # How many batches choose columns, no adapter says.
            kept = _in_order(getattr(saved, option.name, option.default))
            if option.name == "selection" and kept not in strategies():
                kept = option.default  # "fixed", or a strategy that left; the columns are there
            value = _in_order(getattr(section, option.name))
            is_set = option.name in typed[name] or option.name in changed(section)
            # A saved run names no patterns where the default was fitted to narrow weights.
            if is_set and value not in (None, {}, kept):
                raise ValueError(
                    f"`{name}.{option.name}` ({value!r}) contradicts `adapter` ({config.adapter}), "
                    f"which has {kept!r} and is trained as it is; drop the option, or start "
                    "without the adapter."
                )
            setattr(section, option.name, kept)


def _in_order(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | list) else value


def read_start(config: RunConfig) -> PeftConfig:
    """Return the checked configuration of the adapter that a run starts from, ready to train."""
    path = find_file(locate_folder(str(config.adapter)), CONFIG_NAME)
    values, method = read_json_object(path), METHODS[config.method]
    peft_type = str(values.get("peft_type"))
    kind = "paca" if peft_type in FILE_TYPES else peft_type.lower()
    if kind == "lora" and values.get("use_dora"):
        kind = "dora"
    if kind not in (method.name, method.variant_of):
        raise ValueError(
            f"`adapter` ({config.adapter}) is of the kind {kind!r}, and `method` ({method.name!r}) "
            f"trains {method.title}; change one of them."
        )
    if method.is_paca:
        # The base says how it is quantised; see check_quantization.
        options = vars(read_config(path)) | {"base_quantization": None}
        if options["columns"] is not None:
            options["columns"] = load_columns(path.parent)
        saved = adapter_config(method, **options)
    else:
        saved = read_lora_config(path)
    task_type = config.spec.kind.task_type
    if saved.task_type not in (None, task_type):
        raise ValueError(
            f"`adapter` ({config.adapter}) is for the task type {saved.task_type}, and this run "
            f"trains {task_type}; give an adapter that such a run made."
        )
    saved.inference_mode = False
    saved.base_model_name_or_path, saved.revision = None, config.model.revision
    return saved


def check_quantization(adapter: Adapter | LoraAdapter, fresh: PeftConfig) -> None:
    """Refuse to go on with columns on a base that is quantised otherwise than theirs was."""
    before = getattr(adapter.config, "base_quantization", None)
    here = getattr(fresh, "base_quantization", None)
    if before not in (None, here):
        now = repr(format_quantization(here)) if here else "not quantised"
        raise ValueError(
            f"{adapter.folder} was trained on a base quantised as {format_quantization(before)!r}, "
            f"and here it is {now}; set `model.quantization` to what it was."
        )
