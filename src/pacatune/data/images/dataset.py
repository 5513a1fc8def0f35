"""Images as a model sees them: the `Dataset` that a trainer reads."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from pacatune.data.images.prepare import class_names
from pacatune.data.images.sources import load_image


class Augmentation:
    """Random changes of training images, the same for the same seed, epoch and image.

    Torch's global generator is left as it was: batches are loaded ahead of the training step, so a
    resumed run would go on with other random numbers.
    """

    def __init__(self, kind: str, size: int, seed: int) -> None:
        """Make it of kind `flip` or `crop`; `crop` makes images size x size."""
        from torchvision.transforms import v2

        bicubic = v2.InterpolationMode.BICUBIC
        crop = v2.RandomResizedCrop(size, scale=(0.25, 1), interpolation=bicubic)
        steps = [crop, v2.RandomHorizontalFlip()] if kind == "crop" else [v2.RandomHorizontalFlip()]
        self._transform = v2.Compose(steps)
        self._seed = seed
        # What is left to the model's image processor.
        self.options = {"do_resize": False, "do_center_crop": False} if kind == "crop" else {}

    def __call__(self, image: Image.Image, epoch: int, index: int) -> Image.Image:
        """Return an RGB image, number `index` of the data, changed."""
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(hash((self._seed, epoch, index)) % 2**63)
        try:
            return self._transform(image)  # type: ignore[no-any-return]
        finally:
            torch.set_rng_state(state)


class ImageDataset(Dataset[dict[str, Any]]):
    """Images of a table (see `sources`), transformed by the model's own image processor."""

    def __init__(
        self, table: Any, processor: Any, augmentation: Augmentation | None = None
    ) -> None:
        self.table = table
        self.classes = class_names(table)
        self.processor = processor
        self.augmentation = augmentation
        # Set at the start of each: images are augmented anew. Shared with workers that stay.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, position: int) -> dict[str, Any]:
        row, options = self.table[position], {}
        image = load_image(row)
        if self.augmentation is not None:
            image = self.augmentation(image, int(self.epoch), position)
            options = self.augmentation.options
        pixels = self.processor(image, return_tensors="pt", **options)["pixel_values"][0]
        return {"pixel_values": pixels, "labels": row["label"]}

    def picture(self, position: int) -> NDArray[np.float32]:
        """Return (size, size, 3) in [0, 1]: an image as the model sees it, to be drawn."""
        image = load_image(self.table[position])
        seen = self.processor(image, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        return seen.permute(1, 2, 0).clamp(0, 1).numpy()  # type: ignore[no-any-return]
