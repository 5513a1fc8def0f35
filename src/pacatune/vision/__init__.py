"""The image classification recipe: `train(ImageRunConfig(...))`, and loading its results."""

from pacatune.data.images import ImageDataConfig
from pacatune.training.config import LoraSection, MosLoraSection, PacaSection
from pacatune.vision.config import ImageModelConfig, ImageRunConfig, ImageTrainingConfig
from pacatune.vision.load import ImageClassifier, load_result
from pacatune.vision.recipe import train
from pacatune.vision.report import ImageReport

__all__ = [
    "ImageClassifier",
    "ImageDataConfig",
    "ImageModelConfig",
    "ImageReport",
    "ImageRunConfig",
    "ImageTrainingConfig",
    "LoraSection",
    "MosLoraSection",
    "PacaSection",
    "load_result",
    "train",
]
