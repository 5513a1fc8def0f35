"""Fine-tuning: `train(RunConfig(task=..., model=..., data=...))`. Parts are lazy."""

from typing import TYPE_CHECKING, Any

from pacatune.lazy import import_later

if TYPE_CHECKING:
    from pacatune.data.config import DataConfig, PreferenceDataConfig, PromptDataConfig
    from pacatune.training.config import RunConfig
    from pacatune.training.language import preview
    from pacatune.training.recipe import train
    from pacatune.training.report import Report
    from pacatune.training.rewards import RewardError
    from pacatune.training.sections import LoraSection, ModelConfig, PacaSection
    from pacatune.training.tasks import TASKS, TaskSpec
    from pacatune.training.trainer import TrainingDiverged, TrainingInterrupted

    TrainingConfig: Any

__all__ = [
    "TASKS",
    "DataConfig",
    "LoraSection",
    "ModelConfig",
    "PacaSection",
    "PreferenceDataConfig",
    "PromptDataConfig",
    "Report",
    "RewardError",
    "RunConfig",
    "TaskSpec",
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
        "..data.config",
        ".tasks",
        ".config",
        ".sections",
        ".arguments",
        ".rewards",
        ".trainer",
        ".language",
        ".recipe",
    ),
)
