"""The runs of the paper's Tables 6 and 7: its models and data sets, by name.

The paper (Appendix B) names the models, the data sets and the methods compared (ViT-B/16: PaCA and
LoRA; EfficientNetV2-L: PaCA and full fine-tuning), and no other setting: no rank, learning rate,
batch, number of epochs or image size. The settings of Appendix C are those of language models. So
size, batch, epochs and augmentation are ours, and so is the choice among the published weights;
rank and learning rate are the defaults of each method.
"""

from dataclasses import dataclass
from typing import Any

_VIT = "google/vit-base-patch16-224-in21k"
_EFFICIENTNET = "timm/tf_efficientnetv2_l.in21k"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model on a data set; the method is left to the user."""

    model: str
    """Hub id."""
    data: str
    """Name of a torchvision data set."""
    num_epochs: int
    image_size: int = 224
    batch_size: int = 64
    num_workers: int = 4

    def options(self) -> dict[str, Any]:
        """Return the options of `pacatune train-image` that it sets, by their dotted names."""
        return {
            "model.path": self.model,
            "data.path": f"torchvision:{self.data}",
            "data.eval_split": "test",
            "data.image_size": self.image_size,
            "data.augmentation": "crop",
            "training.num_train_epochs": self.num_epochs,
            "training.per_device_train_batch_size": self.batch_size,
            "training.dataloader_num_workers": self.num_workers,
        }


PRESETS = {
    "vit-b16-cifar10": Preset(model=_VIT, data="CIFAR10", num_epochs=3),
    "vit-b16-cifar100": Preset(model=_VIT, data="CIFAR100", num_epochs=3),
    "vit-b16-pets": Preset(model=_VIT, data="OxfordIIITPet", num_epochs=10),
    "vit-b16-flowers102": Preset(model=_VIT, data="Flowers102", num_epochs=30),
    "efficientnetv2-l-cifar10": Preset(model=_EFFICIENTNET, data="CIFAR10", num_epochs=3),
    "efficientnetv2-l-cifar100": Preset(model=_EFFICIENTNET, data="CIFAR100", num_epochs=3),
}


def find_preset(name: str) -> Preset:
    """Return a preset by its name.

    Raises:
        ValueError: If there is none; lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} does not exist; use one of {', '.join(PRESETS)}.")
    return PRESETS[name]
