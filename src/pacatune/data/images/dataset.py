"""Images as a model sees them: the `Dataset` that a trainer reads."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Generator
from torch.utils.data import Dataset

from pacatune.data.images.preprocessing import Preprocessing
from pacatune.data.images.sources import ImageSource

_CROP_AREA = (0.25, 1.0)
_CROP_LOG_ASPECT = math.log(4 / 3)
_EPOCH_STRIDE = 2**32


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images, the same for the same seed, epoch and image.

    Torch's global generator is left alone: batches are loaded ahead of the training step, so a
    resumed run would go on with other random numbers.
    """

    kind: Literal["none", "flip", "crop"]
    seed: int

    def __call__(self, image: Image.Image, size: int, epoch: int, index: int) -> Image.Image:
        """Return the image changed; with `crop`, of size x size pixels.

        Args:
            image: 8-bit RGB.
            size: Final size, for `crop`.
            epoch: Number of the pass over the data.
            index: Number of the image.
        """
        seed = hash((self.seed, epoch * _EPOCH_STRIDE + index)) % 2**63
        generator = Generator().manual_seed(seed)
        if self.kind == "crop":
            box = _random_box(image.width, image.height, generator)
            image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        if self.kind != "none" and _uniform(0, 1, generator) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


class ImageDataset(Dataset[dict[str, Any]]):
    """Some images of a source, transformed.

    Args:
        source: Where they come from.
        indices: Which of them, in order.
        preprocessing: The model's own transform.
        augmentation: For training.
    """

    def __init__(
        self,
        source: ImageSource,
        indices: Sequence[int],
        preprocessing: Preprocessing,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.source = source
        self.indices = indices
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.epoch = 0  # set at the start of each: images are augmented anew

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        image = self.image(position)
        label = self.source.labels[self.indices[position]]
        if self.augmentation is not None and self.augmentation.kind != "none":
            size = self.preprocessing.size
            image = self.augmentation(image, size, self.epoch, self.indices[position])
            if self.augmentation.kind == "crop":
                return {"pixel_values": self.preprocessing.normalise(image), "labels": label}
        return {"pixel_values": self.preprocessing(image), "labels": label}

    def image(self, position: int) -> Image.Image:
        """Return an image as it is, in 8-bit RGB."""
        return self.source.load(self.indices[position])

    def label(self, position: int) -> int:
        """Return the number of the class of an image."""
        return self.source.labels[self.indices[position]]

    def place(self, position: int) -> str:
        """Return where an image comes from."""
        return self.source.place(self.indices[position])


def _random_box(width: int, height: int, generator: Generator) -> tuple[float, float, float, float]:
    """Choose a rectangle by its share of the area and its proportions."""
    area = width * height * _uniform(*_CROP_AREA, generator)
    aspect = math.exp(_uniform(-_CROP_LOG_ASPECT, _CROP_LOG_ASPECT, generator))
    box_width = min(math.sqrt(area * aspect), width)
    box_height = min(math.sqrt(area / aspect), height)
    left = _uniform(0, width - box_width, generator)
    top = _uniform(0, height - box_height, generator)
    return left, top, left + box_width, top + box_height


def _uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))
