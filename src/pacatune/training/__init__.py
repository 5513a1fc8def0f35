"""Fine-tuning: `train(RunConfig(...))`, or the configuration of another task. Parts are lazy."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pacatune.data import DataConfig, PreferenceDataConfig, PromptDataConfig
    from pacatune.training.config import ModelConfig, RunConfig, TrainingConfig
    from pacatune.training.language import preview
    from pacatune.training.preference_config import (
        DpoRunConfig,
        DpoTrainingConfig,
        KtoRunConfig,
        KtoTrainingConfig,
        RewardRunConfig,
        RewardTrainingConfig,
    )
    from pacatune.training.recipe import train
    from pacatune.training.report import Report
    from pacatune.training.rewards import RewardError
    from pacatune.training.rl_config import (
        GrpoRunConfig,
        GrpoTrainingConfig,
        RlooRunConfig,
        RlooTrainingConfig,
    )
    from pacatune.training.sections import LoraSection, MosLoraSection, PacaSection
    from pacatune.training.trainer import TrainingDiverged, TrainingInterrupted

__all__ = [
    "DataConfig",
    "DpoRunConfig",
    "DpoTrainingConfig",
    "GrpoRunConfig",
    "GrpoTrainingConfig",
    "KtoRunConfig",
    "KtoTrainingConfig",
    "LoraSection",
    "ModelConfig",
    "MosLoraSection",
    "PacaSection",
    "PreferenceDataConfig",
    "PromptDataConfig",
    "Report",
    "RewardError",
    "RewardRunConfig",
    "RewardTrainingConfig",
    "RlooRunConfig",
    "RlooTrainingConfig",
    "RunConfig",
    "TrainingConfig",
    "TrainingDiverged",
    "TrainingInterrupted",
    "preview",
    "train",
]

# Each has some of these names; a module is only imported where none before it has the name.
_HOMES = (
    "config",
    "sections",
    "preference_config",
    "rl_config",
    "rewards",
    "trainer",
    "language",
    "recipe",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        modules = (import_module(f"pacatune.training.{home}") for home in _HOMES)
        return next(getattr(module, name) for module in modules if hasattr(module, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
