"""Runs that start from a finished adapter: its columns and options stay, its values go on."""

import copy
from dataclasses import fields
from pathlib import Path
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
from pacatune.pretrained import is_adapter
from pacatune.strategies import strategies
from pacatune.training.config import RunConfig, check_reference
from pacatune.training.sections import check_selection_file


def settle(config: RunConfig) -> RunConfig:
    """Return a run with what its files say: the base and the options of the adapter it starts from.

    An adapter's folder that is given as the model is taken for what it is: `adapter` on its base.
    """
    if METHODS[config.method].is_paca and config.paca.from_file:
        check_selection_file(str(config.paca.selection))
    if "adapter" not in config.spec.reads:
        return config
    settled = copy.copy(config)
    if is_adapter(config.model.path):
        settled.model = copy.copy(config.model)
        settled.adapter, settled.model.path = config.model.path, _base_of(config)
        if config.spec.reference is not None:
            check_reference(settled, config.spec.reference)
    if settled.adapter is not None:
        _take_options(settled)
    return settled


def _base_of(config: RunConfig) -> str:
    """Return the base of the adapter that is given as the model."""
    if config.adapter is not None:
        raise ValueError(
            f"`model.path` ({config.model.path!r}) and `adapter` ({config.adapter!r}) are both "
            "adapters; give the base as `model.path`, or leave `adapter` out."
        )
    local = Path(config.model.path).expanduser()
    base = read_json_object(find_file(local, CONFIG_NAME)).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"`model.path` ({config.model.path!r}) is an adapter that names no base; give the base "
            "as `model.path` and the adapter as `adapter`."
        )
    return base


def _take_options(config: RunConfig) -> None:
    """Fill copies of the sections with the adapter's options; refuse those that contradict it."""
    saved = read_start(config)
    for name in METHODS[config.method].sections:
        section = copy.copy(getattr(config, name))
        setattr(config, name, section)
        given = config.given(name)
        for field in fields(section):
            option = field.name
            # How many batches choose columns, no adapter says.
            kept = _plain(getattr(saved, option, field.default))
            if option == "selection" and kept not in strategies():
                kept = field.default  # "fixed", or a strategy that left; the columns are there
            if option in given and not _is_same(option, given[option], kept):
                raise ValueError(
                    f"`{name}.{option}` ({given[option]!r}) contradicts `adapter` "
                    f"({config.adapter}), which has {kept!r} and is trained as it is; drop the "
                    "option, or start without the adapter."
                )
            setattr(section, option, kept)


def _is_same(option: str, given: object, kept: object) -> bool:
    """Whether a value is the adapter's; targets that are left open contradict nothing."""
    if given is None and option == "target_modules":
        return True
    if isinstance(given, list) and isinstance(kept, list):
        return sorted(map(str, given)) == sorted(map(str, kept))
    return given == kept


def read_start(config: RunConfig, task_type: str | None = None) -> PeftConfig:
    """Return the checked configuration of the adapter that a run starts from, ready to train."""
    folder = locate_folder(str(config.adapter))
    path = find_file(folder, CONFIG_NAME)
    found = read_json_object(path)
    made_by = {"LORA": "lora", "MOSLORA": "moslora", **dict.fromkeys(FILE_TYPES, "paca")}.get(
        str(found.get("peft_type"))
    )
    if made_by == "lora" and found.get("use_dora"):
        made_by = "dora"
    method = METHODS[config.method]
    if made_by not in (method.name, method.variant_of):
        fix = f"set `method` to {made_by}" if made_by else "give one of those"
        raise ValueError(
            f"`adapter` ({config.adapter}) is of the kind {made_by or found.get('peft_type')!r}, "
            f"and `method` ({method.name!r}) trains {method.title}; {fix}."
        )
    if method.is_paca:
        saved = adapter_config(method, **vars(read_config(path)))
    else:
        saved = read_lora_config(path)
    if task_type is not None and saved.task_type not in (None, task_type):
        raise ValueError(
            f"`adapter` ({config.adapter}) is for the task type {saved.task_type}, and this run "
            f"trains {task_type}; give an adapter that such a run made."
        )
    saved.inference_mode = False
    if method.is_paca:
        saved.base_quantization = None  # the base says how it is quantised; see check_quantization
    saved.base_model_name_or_path, saved.revision = None, config.model.revision
    return saved


def check_quantization(adapter: Adapter | LoraAdapter, fresh: PeftConfig) -> None:
    """Refuse to go on with columns on a base that is quantised otherwise than theirs was."""
    before = getattr(adapter.config, "base_quantization", None)
    here = getattr(fresh, "base_quantization", None)
    if before not in (None, here):
        found = repr(format_quantization(here)) if here else "not quantised"
        raise ValueError(
            f"{adapter.folder} was trained on a base quantised as {format_quantization(before)!r}, "
            f"and here it is {found}; set `model.quantization` to what it was."
        )


def _plain(value: Any) -> Any:
    """Return a value as YAML has it."""
    return sorted(value) if isinstance(value, set) else value
