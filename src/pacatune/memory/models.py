"""Find out what a model is like from its configuration alone; nothing of it is ever executed."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pacatune.memory.presets import PRESETS
from pacatune.names import guess, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["load_config", "make_model"]

_MAX_CONFIG_BYTES = 2**22
# Sizes that every decoder has, by transformers' common names.
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def load_config(model: str) -> "PreTrainedConfig":
    """Return the configuration of a model.

    Args:
        model: A name of `PRESETS`, a config.json, a folder that holds one, or a hub id, of which
            nothing but config.json is downloaded.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If it is not the configuration of a model that transformers has the code of, if
            the weights are saved quantised, or if its sizes cannot be.
    """
    from transformers import AutoConfig

    if model in PRESETS:
        preset = PRESETS[model]
        config: PreTrainedConfig = AutoConfig.for_model(preset.model_type, **preset.to_values())
        return config
    values = _read_values(model)
    _check_origin(values, model)
    _check_sizes(values, model)
    _check_sizes(values.get("text_config") or {}, model)
    try:
        config = AutoConfig.for_model(**values)
    except Exception as error:
        # Each class validates in its own way, and with its own kind of exception.
        raise ValueError(f"model {model}: transformers refuses its config.json: {error}") from error
    return config


def make_model(config: "PreTrainedConfig", name: str, dtype: torch.dtype) -> "PreTrainedModel":
    """Return the model without weights, on the meta device.

    Args:
        config: Its configuration.
        name: For messages.
        dtype: Of its weights.

    Raises:
        ValueError: If it is no causal language model.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
            )
    except Exception as error:
        # Classes fail at wrong values in their own ways: unknown activations, missing sizes.
        if "Unrecognized configuration class" not in str(error):
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"model {name}: transformers cannot build it ({what}).") from error
        raise ValueError(
            f"model {name}: {config.model_type!r} is no causal language model; estimates are of "
            "training one."
        ) from error
    return model


def _read_values(model: str) -> dict[str, Any]:
    path = _find_file(model)
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes; a config.json has at most "
            f"{_MAX_CONFIG_BYTES}. Is it the right file?"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; it must be a JSON object.")
    return values


def _find_file(model: str) -> Path:
    local = Path(model).expanduser()
    if local.is_file():
        return local
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise FileNotFoundError(f"{model} holds no config.json; give a model folder.")
        return local / "config.json"
    if model.startswith((".", "/", "~")) or model.endswith(".json") or model.count("/") > 1:
        raise FileNotFoundError(f"{model} does not exist; give a config.json or a model folder.")
    if model.count("/") != 1:
        hint = guess(model.lower(), PRESETS, cutoff=0.4)
        raise ValueError(
            f"unknown model {model!r}; {hint}Known are {', '.join(PRESETS)}, and any config.json, "
            "model folder or hub id."
        )
    return _download(model)


def _download(model: str) -> Path:
    from huggingface_hub import hf_hub_download

    from pacatune.hub import check_on_hub

    check_on_hub(model, "model")
    try:
        return Path(hf_hub_download(model, "config.json"))
    except Exception as error:
        # Offline, gated, missing, misspelled: huggingface_hub has a dozen kinds.
        raise ValueError(
            f"the config.json of {model} cannot be had from the hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); give a local config.json instead."
        ) from error


def _check_origin(values: dict[str, Any], model: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = values.get("model_type")
    if kind in CONFIG_MAPPING:
        if values.get("quantization_config") is not None:
            raise ValueError(
                f"model {model} is saved quantised; give the configuration of the original model, "
                "and choose the quantisation here."
            )
        return
    if "auto_map" in values:
        raise ValueError(
            f"model {model} comes with code of its own, which is never executed; use a version "
            "of it that transformers supports."
        )
    near = nearest(str(kind), CONFIG_MAPPING)
    hint = "." if near is None else f"; did you mean {near!r}?"
    raise ValueError(f"model {model}: `model_type` ({kind!r}) is unknown to transformers{hint}")


def _check_sizes(values: dict[str, Any], model: str) -> None:
    """Refuse sizes of which transformers would only fail in the middle of a step, or not at all."""
    for name in _SIZES:
        value = values.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(
                f"model {model}: `{name}` ({value!r}) must be a whole number of at least 1."
            )
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    if heads and hidden and values.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"model {model}: `hidden_size` ({hidden}) must be a multiple of `num_attention_heads` "
            f"({heads}), or `head_dim` must be given."
        )
    groups = values.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise ValueError(
            f"model {model}: `num_attention_heads` ({heads}) must be a multiple of "
            f"`num_key_value_heads` ({groups})."
        )
    dim = values.get("head_dim")
    if dim and dim % 2:
        raise ValueError(
            f"model {model}: `head_dim` ({dim}) must be even: rotary positions turn pairs."
        )
