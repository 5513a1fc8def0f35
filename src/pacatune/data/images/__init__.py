"""Images for classification: find, check, and transform as the model was trained with."""

from pacatune.data.config import ImageDataConfig
from pacatune.data.images.dataset import Augmentation, ImageDataset, Preprocessing
from pacatune.data.images.prepare import ImagePart, PreparedImages, prepare_images

__all__ = [
    "Augmentation",
    "ImageDataConfig",
    "ImageDataset",
    "ImagePart",
    "PreparedImages",
    "Preprocessing",
    "prepare_images",
]
