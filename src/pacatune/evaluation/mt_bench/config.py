"""What can be chosen about one evaluation."""

import hashlib
import json
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pacatune.adapters.base import DTypeName


__all__ = [
    "SETTINGS_NAME",
    "MtBenchConfig",
    "answer_settings",
    "check_settings",
    "sampled_hash",
    "write_settings",
]


@dataclass(frozen=True, kw_only=True)
class MtBenchConfig:
    """Which model answers what, and who judges."""

    output: Path
    """Folder of answers, judgments and results; a run that finds some of them goes on there."""
    model: str | None = None
    """Folder or hub id of the base; None takes the one that the adapter names."""
    adapter: str | None = None
    """Folder or hub id of an adapter."""
    answers: str | None = None
    """Answers in FastChat's form, to be judged instead of a model's."""
    model_id: str | None = None
    """Name in the results; None makes one of model and adapter."""
    quantization: str | None = None
    """Hold the base in 4 or 8 bits: nf4, fp4 or int8."""
    dtype: "DTypeName" = "auto"
    """Type of the base's weights."""
    device: str = "auto"
    """Of the model."""
    allow_other_base: bool = False
    """Go on although the base is not the one the adapter was trained on."""
    chat_template: Path | None = None
    """File with the Jinja text that writes conversations, instead of the tokenizer's own."""
    max_new_tokens: int = 1024
    """Most tokens of each turn."""
    batch_size: int = 8
    """How many questions are answered at once."""
    seed: int = 0
    """Seed of answers that are sampled, and of the bootstrap."""
    questions: str | None = None
    """File or hub data set; None takes the 80 questions out of their package."""
    references: str | None = None
    """File with reference answers; None takes the questions' own, or those of the package."""
    judge_prompts: Path | None = None
    """File with the judge's prompts; None takes those of the package."""
    categories: tuple[str, ...] = ()
    """Some of the eight; empty takes all."""
    limit: int | None = None
    """How many questions of each category."""
    no_judge: bool = False
    """Only answer."""
    judge_url: str | None = None
    """OpenAI-compatible endpoint, such as https://api.openai.com/v1."""
    judge_model: str = "gpt-4o-mini"
    """Name of the judge there."""
    judge_key_env: str | None = None
    """Environment variable that holds the judge's key; None sends no key."""
    judge_parallel: int = 4
    """How many requests are under way at once."""
    judge_timeout_s: float = 120.0
    """Seconds for one request."""
    judge_retries: int = 6
    """How often a request is repeated that fails in a way that may pass."""
    judge_max_tokens: int = 2048
    """Most tokens of one reply; what a judge thinks before counts."""
    judge_attempts: int = 3
    """How often a judge is asked that replies without a rating from 1 to 10."""
    cache: Path | None = None
    """Keeps the package's data; None takes the user's cache."""

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything."""
        if self.answers is not None and (self.model or self.adapter):
            raise ValueError(
                f"--answers ({self.answers!r}) are there already, so no model is needed; drop "
                "--model and --adapter."
            )
        if not (self.answers or self.model or self.adapter):
            raise ValueError(
                "nothing to evaluate; give --model, --adapter, or --answers that are there already."
            )
        if self.answers is not None and self.no_judge:
            raise ValueError("--answers with --no-judge leaves nothing to do; drop one of them.")
        if not self.no_judge and self.judge_url is None:
            raise ValueError(
                "--judge-url is missing; give an OpenAI-compatible endpoint such as "
                "https://api.openai.com/v1 (with --judge-key-env OPENAI_API_KEY), or only answer: "
                "--no-judge."
            )
        for name, least in (
            ("max_new_tokens", 1),
            ("batch_size", 1),
            ("seed", 0),
            ("judge_parallel", 1),
            ("judge_retries", 0),
            ("judge_attempts", 1),
            ("judge_max_tokens", 1),
            ("limit", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` ({value}) must be at least {least}; raise it.")
        if not 0 < self.judge_timeout_s <= 3600:
            raise ValueError(
                f"`judge_timeout_s` ({self.judge_timeout_s}) must be in (0, 3600] seconds."
            )

    def judge_key(self) -> str | None:
        """Read the key from the environment.

        Raises:
            ValueError: If the variable is not set, or empty.
        """
        if self.judge_key_env is None:
            return None
        key = os.environ.get(self.judge_key_env, "").strip()
        if not key:
            raise ValueError(
                f"--judge-key-env ({_shown_name(self.judge_key_env)}) names a variable that is not "
                "set; export it, or drop the option for a judge without key."
            )
        return key


def _shown_name(name: str) -> str:
    # Whoever confuses name and value would otherwise see the key in the message.
    is_name = name.isidentifier() and name.upper() == name and len(name) <= 40
    return repr(name) if is_name else "not an upper-case name, so not shown"


# What a folder's answers were made with, so that only the same adds to them.


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
        config: The run.
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
        settings: What `answer_settings` returns.
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
        settings: What `answer_settings` returns.

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
