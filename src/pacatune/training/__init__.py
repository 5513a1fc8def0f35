"""Fine-tuning: `train(RunConfig(...))`, or the configuration of another task. Parts are lazy."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pacatune.data import DataConfig, PreferenceDataConfig, PromptDataConfig
    from pacatune.training.config import (
        LoraSection,
        ModelConfig,
        MosLoraSection,
        PacaSection,
        RunConfig,
        TrainingConfig,
    )
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

_HOMES = {
    "data": ("DataConfig", "PreferenceDataConfig", "PromptDataConfig"),
    "training.language": ("preview",),
    "training.preference_config": (
        "DpoRunConfig",
        "DpoTrainingConfig",
        "KtoRunConfig",
        "KtoTrainingConfig",
        "RewardRunConfig",
        "RewardTrainingConfig",
    ),
    "training.recipe": ("train",),
    "training.report": ("Report",),
    "training.rewards": ("RewardError",),
    "training.rl_config": (
        "GrpoRunConfig",
        "GrpoTrainingConfig",
        "RlooRunConfig",
        "RlooTrainingConfig",
    ),
    "training.trainer": ("TrainingDiverged", "TrainingInterrupted"),
}
_OUTSIDE_CONFIG = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _OUTSIDE_CONFIG.get(name, "training.config")
    return getattr(import_module(f"pacatune.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
