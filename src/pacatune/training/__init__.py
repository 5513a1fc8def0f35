"""Fine-tuning: `train(RunConfig(...))`. Parts are imported when used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pacatune.data import DataConfig
    from pacatune.training.config import (
        LoraSection,
        ModelConfig,
        MosLoraSection,
        PacaSection,
        RunConfig,
        TrainingConfig,
    )
    from pacatune.training.language import preview
    from pacatune.training.recipe import train
    from pacatune.training.report import Report
    from pacatune.training.trainer import TrainingDiverged, TrainingInterrupted

__all__ = [
    "DataConfig",
    "LoraSection",
    "ModelConfig",
    "MosLoraSection",
    "PacaSection",
    "Report",
    "RunConfig",
    "TrainingConfig",
    "TrainingDiverged",
    "TrainingInterrupted",
    "preview",
    "train",
]

_OUTSIDE_CONFIG = {
    "DataConfig": "pacatune.data",
    "Report": "pacatune.training.report",
    "TrainingDiverged": "pacatune.training.trainer",
    "TrainingInterrupted": "pacatune.training.trainer",
    "preview": "pacatune.training.language",
    "train": "pacatune.training.recipe",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_OUTSIDE_CONFIG.get(name, "pacatune.training.config")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
