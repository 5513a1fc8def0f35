"""The text fine-tuning recipe: `train(RunConfig(...))`."""

from pacatune.data import DataConfig
from pacatune.training.config import (
    LoraSection,
    ModelConfig,
    MosLoraSection,
    PacaSection,
    RunConfig,
    TrainingConfig,
)
from pacatune.training.finite import TrainingDiverged
from pacatune.training.interrupt import TrainingInterrupted
from pacatune.training.recipe import preview, train
from pacatune.training.report import Report

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
