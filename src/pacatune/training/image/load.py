"""Load what a run on images has saved: the model, its transform, its classes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pacatune.adapters.folder import SIDECAR_NAME
from pacatune.data.images import Preprocessing
from pacatune.data.images.dataset import PREPROCESSOR_NAME
from pacatune.data.images.sources import to_rgb
from pacatune.training.image.base import describe_base
from pacatune.training.image.model import load_model

CLASSES_KEY = "classes"


@dataclass(frozen=True, kw_only=True)
class ImageClassifier:
    """A fine-tuned model with everything that goes with it."""

    model: Any
    """In evaluation mode; a PeftModel where an adapter was trained."""
    preprocessing: Preprocessing
    classes: list[str]
    forward_options: dict[str, Any]

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """Return (B, C) for prepared images (B, 3, size, size)."""
        pixels = pixels.to(next(self.model.parameters()).device)
        logits: Tensor = self.model(pixel_values=pixels, **self.forward_options).logits
        return logits.float()

    def classify(self, image: str | Path | Image.Image) -> dict[str, float]:
        """Return the probability of each class, the likeliest first.

        Args:
            image: A file, or an image of any kind that Pillow opens.
        """
        if not isinstance(image, Image.Image):
            with Image.open(image) as opened:
                return self.classify(opened)
        pixels = self.preprocessing(to_rgb(image)).unsqueeze(0)
        shares = self.logits(pixels)[0].softmax(-1).tolist()
        return dict(sorted(zip(self.classes, shares, strict=True), key=lambda pair: -pair[1]))


def load_result(folder: str | Path, base: str | None = None) -> ImageClassifier:
    """Load the output folder of `pacatune train-image`.

    Args:
        folder: Output folder of a finished run.
        base: Where the base of an adapter is, if not where it was trained.

    Raises:
        FileNotFoundError: If the folder holds no such result, or the base is not there.
    """
    folder = Path(folder).expanduser()
    if not (folder / PREPROCESSOR_NAME).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {PREPROCESSOR_NAME}, so it is no finished run of "
            "`pacatune train-image`; check the path."
        )
    values = json.loads((folder / PREPROCESSOR_NAME).read_text(encoding="utf-8"))
    preprocessing = Preprocessing.from_transformers(values)
    is_adapter = (folder / "adapter_config.json").is_file()
    path, revision, classes = str(folder), None, None
    if is_adapter:
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        path, revision = base or adapter["base_model_name_or_path"], adapter.get("revision")
        classes = json.loads((folder / SIDECAR_NAME).read_text(encoding="utf-8"))[CLASSES_KEY]
    described = describe_base(path, revision, classes, preprocessing.size)
    model = load_model(described, torch.float32)
    if is_adapter:
        from peft import PeftModel

        import pacatune  # noqa: F401 (makes PaCA known to PEFT)

        model = PeftModel.from_pretrained(model, str(folder))
    return ImageClassifier(
        model=model.eval(),
        preprocessing=preprocessing,
        classes=list(described.config.id2label.values()),
        forward_options=described.forward_options,
    )
