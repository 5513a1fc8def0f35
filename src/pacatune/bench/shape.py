"""Sizes of the measured model: a Llama of any size, or what a config.json says."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

__all__ = ["llama_values", "load_values", "parse_shape"]

# Of Llama's: the MLP is 8/3 as wide as the model, rounded up; 2-7B has 7.8 tokens per channel.
_ROUND_MLP_TO = 128
_TOKENS_PER_CHANNEL, _MAX_VOCAB = 8, 32000
_WIDE = 2048
_PRESETS = "pacatune.memory.models"


def parse_shape(text: str) -> tuple[int, int]:
    """Return hidden size and number of layers of a text such as `512x8`.

    Raises:
        ValueError: If it is none, or a number is zero.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    numbers = tuple(int(number) for number in match.groups()) if match else ()
    if len(numbers) != 2 or 0 in numbers:
        raise ValueError(
            f"`shape` ({text!r}) must be HIDDENxLAYERS, two whole numbers of at least 1, such as "
            "512x8."
        )
    return numbers[0], numbers[1]


def llama_values(
    hidden_size: int,
    num_layers: int,
    *,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    intermediate_size: int | None = None,
    vocab_size: int | None = None,
) -> dict[str, Any]:
    """Return the configuration values of a Llama, in Llama's proportions unless given.

    Args:
        hidden_size: H.
        num_layers: Blocks.
        num_heads: Attention heads; of 128 channels from H = 2048 on, else of 64 or fewer.
        num_kv_heads: Heads of keys and values; as many as `num_heads`.
        intermediate_size: Of the MLP; 8/3 H, rounded up to 128.
        vocab_size: Tokens; 8 H, at most 32000.

    Raises:
        ValueError: If a size is below 1, or the heads do not divide.
    """
    _check_positive(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
    )
    heads = num_heads or _num_heads(hidden_size)
    if hidden_size % heads or hidden_size // heads % 2:
        raise ValueError(
            f"`num_heads` ({heads}) must divide `hidden_size` ({hidden_size}) into an even number "
            "of channels per head; choose another number of heads."
        )
    kv_heads = num_kv_heads or heads
    if heads % kv_heads:
        raise ValueError(
            f"`num_kv_heads` ({kv_heads}) must divide `num_heads` ({heads}); choose another."
        )
    mlp = -(-(8 * hidden_size) // (3 * _ROUND_MLP_TO)) * _ROUND_MLP_TO
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size or mlp,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab_size or min(_TOKENS_PER_CHANNEL * hidden_size, _MAX_VOCAB),
        "tie_word_embeddings": False,
    }


def _check_positive(**sizes: int | None) -> None:
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` ({value}) must be at least 1.")


def _num_heads(hidden_size: int) -> int:
    sizes = (128, 64, 32, 16, 8) if hidden_size >= _WIDE else (64, 32, 16, 8)
    for size in sizes:
        if hidden_size % size == 0:
            return hidden_size // size
    raise ValueError(
        f"`hidden_size` ({hidden_size}) does not divide into heads of {', '.join(map(str, sizes))} "
        "channels; choose a multiple of 8, or give the number of heads."
    )


def load_values(model: str) -> dict[str, Any]:
    """Return the configuration values of a named model; no weights are read, no code is run.

    Args:
        model: A folder with a config.json, such a file, or a preset such as `llama3-8b`.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If the name is unknown, or the configuration is none of a model that
            transformers has the code of.
    """
    try:
        presets = importlib.import_module(_PRESETS)
    except ModuleNotFoundError as error:
        if error.name != _PRESETS:
            raise
        return _read_config(model)
    values: dict[str, Any] = presets.load_config(model).to_dict()
    return values


def _read_config(model: str) -> dict[str, Any]:
    path = Path(model).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"model {model!r}: there is no config.json; give a model folder, a config.json, or "
            "--shape HIDDENxLAYERS."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"model {model!r}: `model_type` ({kind!r}) is unknown to transformers; code that comes "
            "with a model is never run."
        )
    if values.get("quantization_config") is not None:
        raise ValueError(
            f"model {model!r} is saved quantised; give the original model, and choose qlora or "
            "qpaca among the methods."
        )
    return dict(values)
