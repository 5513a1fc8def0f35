"""The sections of a run on images that are its own, and the runs of the paper."""

from dataclasses import dataclass
from typing import Any, ClassVar

from pacatune.names import choose
from pacatune.training.arguments import ClassifierTrainingConfig


@dataclass
class ImageTrainingConfig(ClassifierTrainingConfig):
    """Every option of transformers' TrainingArguments, with these defaults."""

    elsewhere: ClassVar[dict[str, str]] = {
        **ClassifierTrainingConfig.elsewhere,
        "label_names": "the class of an image is its only label",
        "prediction_loss_only": "the accuracy is always measured",
        "batch_eval_metrics": "the accuracy is measured over all images at once",
    }

    per_device_train_batch_size: int = 32
    """Images per device and step."""

    remove_unused_columns: bool = False
    """Not offered."""

    train_batch_norm: bool = False
    """Let BatchNorm normalise by the batch and update its running statistics, which are saved and
    restored with the result. Otherwise it stays as it was pretrained."""

    mixup_alpha: float = 0.0
    """Mix pairs of training images and their classes, in shares drawn from Beta(alpha, alpha); 0
    mixes nothing."""


# The runs of the paper's Tables 6 and 7. Its Appendix B names models, data sets and methods alone:
# size, batch, epochs, augmentation and the choice among the published weights are ours.
_MODELS = {
    "vit-b16": "google/vit-base-patch16-224-in21k",
    "efficientnetv2-l": "timm/tf_efficientnetv2_l.in21k",
}
PRESETS = {
    "vit-b16-cifar10": ("CIFAR10", 3),
    "vit-b16-cifar100": ("CIFAR100", 3),
    "vit-b16-pets": ("OxfordIIITPet", 10),
    "vit-b16-flowers102": ("Flowers102", 30),
    "efficientnetv2-l-cifar10": ("CIFAR10", 3),
    "efficientnetv2-l-cifar100": ("CIFAR100", 3),
}
"""Name, which begins with the model's -> torchvision's data set, and the number of epochs."""


def find_preset(name: str) -> dict[str, Any]:
    """Return the options of a preset, by their dotted names; the method is the user's."""
    data, num_epochs = PRESETS[choose(name, PRESETS, option="preset")]
    return {
        "model.path": _MODELS[name.rpartition("-")[0]],
        "data.path": f"torchvision:{data}",
        "data.eval_split": "test",
        "data.image_size": 224,
        "data.augmentation": "crop",
        "training.num_train_epochs": num_epochs,
        "training.per_device_train_batch_size": 64,
        "training.dataloader_num_workers": 4,
    }
