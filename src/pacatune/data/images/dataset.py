"""Images as a model sees them: the `Dataset` that a trainer reads."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import Dataset

from pacatune.data.images.sources import ImageSource

PREPROCESSOR_NAME = "preprocessor_config.json"
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
_CROP_AREA = (0.25, 1.0)
_CROP_LOG_ASPECT = math.log(4 / 3)
_EPOCH_STRIDE = 2**32


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resizes, crops the middle, and normalises: an 8-bit RGB image -> (3, size, size)."""

    size: int
    """Height and width that the model sees."""
    resize: int
    """Length to which the shorter edge is resized before cropping; both edges where `squash`."""
    squash: bool = False
    """Resize both edges, whatever the proportions."""
    resample: int = int(Image.Resampling.BICUBIC)
    """Pillow's number of the filter."""
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD

    def __call__(self, image: Image.Image) -> Tensor:
        """Return what the model sees of an image."""
        return self.normalise(self.crop(image))

    def crop(self, image: Image.Image) -> Image.Image:
        """Resize an RGB image and cut the middle out: size x size pixels."""
        width, height = self.resize, self.resize
        if not self.squash and image.width < image.height:
            height = int(self.resize * image.height / image.width)
        elif not self.squash:
            width = int(self.resize * image.width / image.height)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        resized = image.resize((width, height), Image.Resampling(self.resample))
        return resized.crop((left, top, left + self.size, top + self.size))

    def normalise(self, image: Image.Image) -> Tensor:
        """Return an RGB image of the final size as (3, size, size)."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def resized_to(self, size: int) -> "Preprocessing":
        """Return the same for another size, with the same share of the image cropped away."""
        return replace(self, size=size, resize=round(size * self.resize / self.size))

    def save(self, folder: str | Path) -> None:
        """Write preprocessor_config.json, which transformers reads too."""
        square = {"height": self.size, "width": self.size}
        values: dict[str, Any] = {
            "image_processor_type": "ViTImageProcessor" if self.squash else "BitImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "resample": self.resample,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.squash:
            values["size"] = square
        else:
            values |= {
                "size": {"shortest_edge": self.resize},
                "do_center_crop": True,
                "crop_size": square,
            }
        text = json.dumps(values, indent=2)
        Path(folder, PREPROCESSOR_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_transformers(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """Read the settings of one of transformers' image processors, as `to_dict` returns them."""
        size, crop = values.get("size") or {}, values.get("crop_size")
        edge = size.get("shortest_edge")
        if values.get("crop_pct") and edge:  # ConvNeXT's: `size` is what is left after cropping
            final, resize = edge, int(edge / values["crop_pct"])
        elif values.get("do_center_crop") and crop:
            final, resize = _square(crop, "crop_size"), edge or _square(size, "size")
        else:
            final = resize = edge or _square(size, "size")
        if values.get("do_rescale") is False or values.get("rescale_offset"):
            raise ValueError(
                "the model's image processor does not scale pixels to [0, 1], which is the only "
                "scale that is known here; use another model."
            )
        normalises = values.get("do_normalize", True)
        return cls(
            size=final,
            resize=resize,
            squash=not edge,
            resample=int(values.get("resample", Image.Resampling.BILINEAR)),
            mean=tuple(values["image_mean"]) if normalises else (0.0, 0.0, 0.0),
            std=tuple(values["image_std"]) if normalises else (1.0, 1.0, 1.0),
        )

    @classmethod
    def from_timm(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """Read timm's `pretrained_cfg`, or the data configuration resolved from it."""
        _, height, width = values["input_size"]
        final = _square({"height": height, "width": width}, "input_size")
        mode = values.get("crop_mode") or "center"
        if mode not in ("center", "squash"):
            raise ValueError(
                f"the model's `crop_mode` ({mode!r}) is not supported; it must be 'center' or "
                "'squash'. Edit it in the model's config.json."
            )
        return cls(
            size=final,
            resize=int(final / values.get("crop_pct", 0.875)),
            squash=mode == "squash",
            resample=_FILTERS[values.get("interpolation", "bicubic")],
            mean=tuple(values.get("mean", _IMAGENET_MEAN)),
            std=tuple(values.get("std", _IMAGENET_STD)),
        )

    def to_timm(self) -> dict[str, Any]:
        """Return the entries of timm's `pretrained_cfg` that say the same."""
        return {
            "input_size": (3, self.size, self.size),
            "crop_pct": self.size / (self.resize + 0.5),  # the half: timm divides and rounds down
            "crop_mode": "squash" if self.squash else "center",
            "interpolation": next(k for k, v in _FILTERS.items() if v == self.resample),
            "mean": self.mean,
            "std": self.std,
        }


def _square(size: Mapping[str, int], name: str) -> int:
    height, width = size.get("height"), size.get("width")
    if height is None or height != width:
        raise ValueError(
            f"the model's `{name}` ({dict(size)}) is not a square; only squares are supported."
        )
    return height


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images, the same for the same seed, epoch and image.

    Torch's global generator is left alone: batches are loaded ahead of the training step, so a
    resumed run would go on with other random numbers.
    """

    kind: Literal["none", "flip", "crop"]
    seed: int

    def __call__(self, image: Image.Image, size: int, epoch: int, index: int) -> Image.Image:
        """Return an RGB image, number `index` of the data, changed; `crop` makes it size x size."""
        seed = hash((self.seed, epoch * _EPOCH_STRIDE + index)) % 2**63
        generator = Generator().manual_seed(seed)
        if self.kind == "crop":
            box = _random_box(image.width, image.height, generator)
            image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        if self.kind != "none" and _uniform(0, 1, generator) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


class ImageDataset(Dataset[dict[str, Any]]):
    """Some images of a source, transformed by the model's own preprocessing."""

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
        # Set at the start of each: images are augmented anew. Shared with workers that stay.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        image = self.image(position)
        label = self.label(position)
        if self.augmentation is not None and self.augmentation.kind != "none":
            size = self.preprocessing.size
            image = self.augmentation(image, size, int(self.epoch), self.indices[position])
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
