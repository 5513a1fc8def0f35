"""Runs that start from a finished adapter: its columns and options stay, its values go on."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from pacatune.training.sections import OF_THE_RUN

if TYPE_CHECKING:
    from pacatune.training.config import LanguageRunConfig

# What chooses columns, which a finished adapter has.
_CHOICES = ("selection_batches", "share_columns", "budget")


def find_start(config: "LanguageRunConfig[Any]") -> None:
    """Take an adapter's folder that is given as the model for what it is: `adapter` on its base."""
    if not is_adapter(config.model.path):
        return
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
    config.adapter, config.model.path = config.model.path, base


def settle_start(config: "LanguageRunConfig[Any]") -> None:
    """Fill the sections with the options of the adapter, and refuse those that contradict it."""
    if config.adapter is None:
        return
    saved = read_start(config)
    for name in METHODS[config.method].sections:
        section = getattr(config, name)
        default = type(section)()
        for option in (field.name for field in fields(section)):
            given = getattr(section, option)
            if option in OF_THE_RUN:
                if option in _CHOICES and given != getattr(default, option):
                    raise ValueError(
                        f"`{name}.{option}` ({given!r}) chooses columns, and those of `adapter` "
                        f"({config.adapter}) stay; drop it."
                    )
                continue
            kept = _plain(getattr(saved, option))
            if given != getattr(default, option):
                check_given(config, f"{name}.{option}", given, kept)
            setattr(section, option, kept)


def check_given(config: "LanguageRunConfig[Any]", option: str, given: object, kept: object) -> None:
    """Refuse the value of an option that is not the adapter's.

    Target modules that are left open contradict nothing: the adapter has what was found for them.
    """
    if given is None and option.endswith(".target_modules"):
        return
    if isinstance(given, list) and isinstance(kept, list):
        same = sorted(map(str, given)) == sorted(map(str, kept))
    else:
        same = given == kept
    if not same:
        raise ValueError(
            f"`{option}` ({given!r}) contradicts `adapter` ({config.adapter}), which has {kept!r} "
            "and is trained as it is; drop the option, or start without the adapter."
        )


def read_start(config: "LanguageRunConfig[Any]", task_type: str | None = None) -> PeftConfig:
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
