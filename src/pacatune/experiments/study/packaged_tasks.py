"""Tasks of real models on real data that come as Python packages, sized for two cores.

Steps, batches and sizes are ours. The grids are a factor of three around rates that trained well in
short trials; docs/selection_study.md says more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pacatune.data.packaged import (
    prepare_cifar10,
    prepare_dino,
    prepare_efficientnet,
    prepare_minilm,
    prepare_model,
    prepare_question_types,
    prepare_questions,
    prepare_reasoning,
)
from pacatune.methods import METHODS
from pacatune.names import guess

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PackagedTask:
    """A base run whose model and data are fetched the first time."""

    command: str
    prepare: Callable[[Path, Say], dict[str, Any]]
    """(cache, say) -> options of the base run."""
    learning_rates: dict[str, list[float]]
    """Method -> grid."""
    metric: str | None = None
    """What `metric: auto` compares; None: the command's first."""


def find_packaged_task(name: str) -> PackagedTask:
    """Return a packaged task by its name."""
    if name not in PACKAGED_TASKS:
        raise ValueError(
            f"`task` ({name!r}) is neither a file nor a packaged task; "
            f"{guess(name, PACKAGED_TASKS)}The packaged tasks are {', '.join(PACKAGED_TASKS)}."
        )
    return PACKAGED_TASKS[name]


def _smollm2_chat(cache: Path, say: Say) -> dict[str, Any]:
    model = prepare_model(cache, say)
    train, heldout = prepare_questions(cache)
    return {
        # float32 for all: full fine-tuning needs it, and the methods are to have the same.
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"path": str(train), "eval_path": str(heldout)},
        "training": {
            "max_steps": 24,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 16,
        },
    }


def _smollm2_problems(cache: Path, say: Say, *, name: str, num_steps: int) -> dict[str, Any]:
    model = prepare_model(cache, say)
    train, test = prepare_reasoning(cache, name)
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"path": str(train), "eval_path": str(test)},
        "training": {
            "max_steps": num_steps,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 40,
            "warmup_steps": num_steps // 10,
            "bf16": True,
        },
    }


def _minilm_questions(cache: Path, say: Say) -> dict[str, Any]:
    model = prepare_minilm(cache, say)
    train, test = prepare_question_types(cache, say)
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"path": str(train), "eval_path": str(test), "max_length": 64},
        "training": {"max_steps": 120, "per_device_train_batch_size": 16},
    }


def _images(model: Path, images: Path, size: int, num_steps: int) -> dict[str, Any]:
    return {
        "model": {"path": str(model)},
        "data": {
            "path": str(images),
            "train_per_class": 200,
            "eval_per_class": 100,
            "image_size": size,
        },
        "training": {
            "max_steps": num_steps,
            "per_device_train_batch_size": 32,
            "warmup_steps": num_steps // 5,
        },
    }


def _efficientnet_cifar10(cache: Path, say: Say) -> dict[str, Any]:
    return _images(prepare_efficientnet(cache, say), prepare_cifar10(cache, say), 96, 60)


def _dinov2_cifar10(cache: Path, say: Say) -> dict[str, Any]:
    return _images(prepare_dino(cache, say), prepare_cifar10(cache, say), 98, 60)


def _grids(adapters: list[float], **others: list[float]) -> dict[str, list[float]]:
    names = [name for name, method in METHODS.items() if method.has_adapter]
    return {**dict.fromkeys(names, adapters), **others}


PACKAGED_TASKS = {
    "smollm2-chat": PackagedTask(
        command="train",
        prepare=_smollm2_chat,
        learning_rates=_grids([2e-3, 6e-3, 1.8e-2], full=[3e-5, 1e-4, 3e-4]),
    ),
    "smollm2-reverse-words": PackagedTask(
        command="train",
        prepare=partial(_smollm2_problems, name="reverse-words", num_steps=40),
        learning_rates=_grids([2e-3, 6e-3, 1.8e-2], full=[3e-5, 1e-4, 3e-4]),
        metric="exact_match",
    ),
    "minilm-questions": PackagedTask(
        command="classify",
        prepare=_minilm_questions,
        learning_rates=_grids(
            [2e-3, 6e-3, 1.8e-2], full=[5e-5, 1.5e-4, 4.5e-4], head=[3e-3, 1e-2, 3e-2]
        ),
    ),
    "efficientnet-cifar10": PackagedTask(
        command="train-image",
        prepare=_efficientnet_cifar10,
        learning_rates=_grids(
            [2e-3, 6e-3, 1.8e-2], full=[3e-4, 1e-3, 3e-3], head=[3e-3, 1e-2, 3e-2]
        ),
    ),
    "dinov2-cifar10": PackagedTask(
        command="train-image",
        prepare=_dinov2_cifar10,
        learning_rates=_grids([1e-3, 3e-3, 9e-3], full=[3e-5, 1e-4, 3e-4], head=[3e-3, 1e-2, 3e-2]),
    ),
}
