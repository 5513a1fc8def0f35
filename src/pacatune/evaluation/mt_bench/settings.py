"""What a folder's answers were made with, so that only the same adds to them."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pacatune.evaluation.mt_bench.config import MtBenchConfig

__all__ = ["SETTINGS_NAME", "answer_settings", "check_settings", "sampled_hash", "write_settings"]

SETTINGS_NAME = "answers.json"
_WEIGHTS = (".safetensors", ".bin", ".gguf")
_SMALL = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 2**12


def answer_settings(
    config: MtBenchConfig, model_id: str, chat_template: str | None
) -> dict[str, Any]:
    """Return what decides over answers, and for the record what was installed.

    Args:
        config: Of the run.
        model_id: Name of the model.
        chat_template: Text that replaces the tokenizer's.
    """
    template = None if chat_template is None else hashlib.sha256(chat_template.encode()).hexdigest()
    decides = {
        "model_id": model_id,
        "model": config.model,
        "model_weights": sampled_hash(config.model),
        "adapter": config.adapter,
        "adapter_weights": sampled_hash(config.adapter),
        "quantization": config.quantization,
        "dtype": config.dtype,
        "chat_template_sha256": template,
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
    }
    packages = ("pacatune", "torch", "transformers", "peft")
    return {
        "decides": decides,
        "batch_size": config.batch_size,
        "device": config.device,
        "versions": {name: version(name) for name in packages},
    }


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Note what makes a folder's answers, unless that is noted already.

    Args:
        folder: Output folder.
        settings: Of `answer_settings`.
    """
    path = folder / SETTINGS_NAME
    if not path.is_file():
        partial = path.with_name(f".{SETTINGS_NAME}")
        partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to add answers to a folder whose answers were made with other settings.

    Args:
        folder: Output folder; it may be missing.
        settings: Of `answer_settings`.

    Raises:
        ValueError: Names what differs.
    """
    path = folder / SETTINGS_NAME
    if not path.is_file():
        return
    try:
        old = dict(json.loads(path.read_text(encoding="utf-8"))["decides"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged, so nobody knows what made the answers there; choose another "
            "folder: --output DIR."
        ) from error
    differing = [
        f"{name} was {old.get(name)!r} and is {value!r}"
        for name, value in settings["decides"].items()
        if old.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{folder} holds answers made otherwise: {'; '.join(differing)}. Give the same "
            "options, or choose another folder: --output DIR."
        )


def sampled_hash(folder: str | None) -> str | None:
    """Return a hash of a model's or adapter's files, of the large ones by samples.

    Training changes weights everywhere, so that samples tell one state from another.

    Args:
        folder: None, or a hub id, has none.
    """
    if folder is None or not Path(folder).expanduser().is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(Path(folder).expanduser().iterdir()):
        if path.suffix in _WEIGHTS or path.name in _SMALL:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                step = max(size // _NUM_SAMPLES, _SAMPLE_BYTES)
                for start in range(0, size, step):
                    file.seek(start)
                    digest.update(file.read(_SAMPLE_BYTES if path.suffix in _WEIGHTS else step))
    return digest.hexdigest()
