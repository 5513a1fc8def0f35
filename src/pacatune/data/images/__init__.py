"""Images for classification: find, check, transform as the model was trained with. Lazy parts."""

from typing import TYPE_CHECKING

from pacatune.lazy import import_later

if TYPE_CHECKING:
    from pacatune.data.config import ImageDataConfig
    from pacatune.data.images.dataset import Augmentation, ImageDataset
    from pacatune.data.images.prepare import PreparedImages, prepare_images

__all__ = [
    "Augmentation",
    "ImageDataConfig",
    "ImageDataset",
    "PreparedImages",
    "prepare_images",
]

__getattr__, __dir__ = import_later(__name__, __all__, ("..config", ".dataset", ".prepare"))
