"""Fine-tuning of image classifiers: `train(RunConfig(task="image", ...))`, and loading its results.

Parts are lazy: the command line reads their options without torch.
"""

from typing import TYPE_CHECKING

from pacatune.lazy import import_later

if TYPE_CHECKING:
    from pacatune.data.config import ImageDataConfig
    from pacatune.training.config import RunConfig
    from pacatune.training.image.config import ImageModelConfig, ImageTrainingConfig
    from pacatune.training.image.model import ImageClassifier, load_result
    from pacatune.training.image.report import ImageReport
    from pacatune.training.recipe import train
    from pacatune.training.sections import LoraSection, MosLoraSection, PacaSection

__all__ = [
    "ImageClassifier",
    "ImageDataConfig",
    "ImageModelConfig",
    "ImageReport",
    "ImageTrainingConfig",
    "LoraSection",
    "MosLoraSection",
    "PacaSection",
    "RunConfig",
    "load_result",
    "train",
]

__getattr__, __dir__ = import_later(
    __name__,
    __all__,
    ("...data.config", ".config", "..sections", "..config", ".report", ".model", "..recipe"),
)
