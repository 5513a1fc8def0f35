"""Read and check adapter_config.json before anything acts on it."""

import difflib
import types
import typing
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from pacatune.adapters.json_file import read_json_object
from pacatune.options import FILE_TYPES, PacaOptions
from pacatune.patterns import check_patterns

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG_NAME = "adapter_config.json"

# PEFT's TaskType, checked here so that a file can be read without PEFT.
_TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)


def read_config(path: Path) -> PacaOptions:
    """Read the configuration of a PaCA adapter.

    Args:
        path: An adapter_config.json.

    Returns:
        The configuration; its own checks have passed too.

    Raises:
        ValueError: If the file is no bounded JSON object, is not PaCA's, holds a key that
            PacaOptions does not have, or a value of another type or out of range.
    """
    config = read_json_object(path)
    method = config.get("peft_type")
    if method not in FILE_TYPES:
        raise ValueError(
            f"{path} gives `peft_type` = {method!r}; it must be "
            f"{' or '.join(map(repr, FILE_TYPES))}. This is not a PaCA adapter."
        )
    hints = typing.get_type_hints(PacaOptions)
    known = {field.name for field in fields(PacaOptions)}
    for key, value in config.items():
        if key not in known:
            raise ValueError(_unknown_key(key, known, path))
        if not _fits(value, hints[key]):
            raise ValueError(
                f"{path} gives `{key}` = {str(value)[:80]!r} ({type(value).__name__}); "
                f"it must be {_describe(hints[key])}."
            )
    task = config.get("task_type")
    if task is not None and task not in _TASK_TYPES:
        raise ValueError(
            f"{path}: Invalid task type: {task[:80]!r}; it must be one of {', '.join(_TASK_TYPES)}."
        )
    try:
        check_patterns(config)
        return PacaOptions(**config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_lora_config(path: Path) -> "LoraConfig":
    """Read the configuration of a LoRA or MosLoRA adapter, as far as PEFT does not check it itself.

    Keys of another version of PEFT are passed over while they are empty, so off.

    Args:
        path: An adapter_config.json.

    Raises:
        ValueError: If the file is no bounded JSON object, is not LoRA's, sets a key that PEFT does
            not know, names code to import, or is not accepted by LoraConfig.
    """
    config = read_json_object(path)
    method = config.get("peft_type")
    if method not in ("LORA", "MOSLORA"):
        raise ValueError(
            f"{path} gives `peft_type` = {method!r}; only adapters of the methods PACA, LORA and "
            "MOSLORA can be loaded."
        )
    from peft import LoraConfig

    from pacatune.baselines import MosLoraConfig

    config_class = LoraConfig if method == "LORA" else MosLoraConfig
    known = {field.name for field in fields(config_class)} - {"runtime_config"}
    for key, value in config.items():
        if key not in known and value:
            raise ValueError(_unknown_key(key, known, path))
    if config.get("megatron_config"):
        raise ValueError(
            f"{path} sets `megatron_config`, which makes PEFT import a module that the file names; "
            "set it to null."
        )
    try:
        check_patterns(config)
        return config_class(**{key: value for key, value in config.items() if key in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _unknown_key(key: str, known: set[str], path: Path) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)
    return (
        f"{path} holds the unknown key {key[:80]!r}; the nearest known one is {nearest[0]!r}. "
        "Correct or remove it; if a newer version of pacatune or PEFT wrote it, upgrade."
    )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of an annotated type; an int is a float, a bool is no int."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict or hint is dict:
        value_hint = arguments[1] if arguments else Any
        return isinstance(value, dict) and all(_fits(item, value_hint) for item in value.values())
    if hint is Any:
        return True
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if hint is type(None):
        return "null"
    if origin is list:
        return f"a list of {_describe(arguments[0])}"
    if origin is dict or hint is dict:
        return "an object" if not arguments else f"an object of {_describe(arguments[1])}"
    return str(getattr(hint, "__name__", hint))
