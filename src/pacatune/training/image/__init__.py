"""Fine-tuning of image classifiers: `train(RunConfig(task="image", ...))`, and loading its results.

Parts are lazy: the command line reads their options without torch.
"""

from typing import TYPE_CHECKING

from pacatune.lazy import import_later

if TYPE_CHECKING:
    from pacatune.training.image.config import ImageTrainingConfig
    from pacatune.training.image.model import ImageClassifier, load_result
    from pacatune.training.sections import ImageModelConfig

__all__ = ["ImageClassifier", "ImageModelConfig", "ImageTrainingConfig", "load_result"]

__getattr__, __dir__ = import_later(__name__, __all__, (".config", "..sections", ".model"))
