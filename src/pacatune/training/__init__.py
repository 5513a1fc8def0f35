"""Fine-tuning: `train(RunConfig(...))`, or the configuration of another task. Parts are lazy."""

from typing import TYPE_CHECKING

from pacatune.lazy import import_later

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

__getattr__, __dir__ = import_later(
    __name__,
    __all__,
    (
        ".config",
        ".sections",
        ".preference_config",
        ".rl_config",
        ".rewards",
        ".trainer",
        ".language",
        ".recipe",
    ),
)
