"""The data sets of the paper's Tables 6 and 7, as torchvision downloads and reads them."""

from pathlib import Path
from typing import Any

import torch

from pacatune.data.images.config import TORCHVISION_PREFIX, ImageDataConfig
from pacatune.data.images.sources import TorchvisionSource

# Name -> the splits it has; the first is what one trains on.
_SPLITS = {
    "CIFAR10": ("train", "test"),
    "CIFAR100": ("train", "test"),
    "OxfordIIITPet": ("trainval", "test"),
    "Flowers102": ("train", "val", "test"),
}


def read_torchvision(config: ImageDataConfig, name: str, split: str | None) -> TorchvisionSource:
    """Return one split, downloaded where it is missing.

    Raises:
        ValueError: If there is no such data set or split, or a package is missing.
        FileNotFoundError: If it can neither be found nor downloaded.
    """
    from torchvision import datasets

    if name not in _SPLITS:
        known = ", ".join(TORCHVISION_PREFIX + known for known in _SPLITS)
        raise ValueError(f"`data.path`: torchvision:{name} is not offered; use one of {known}.")
    split = split or _SPLITS[name][0]
    if split not in _SPLITS[name]:
        raise ValueError(
            f"torchvision:{name} has no split {split!r}; use one of {', '.join(_SPLITS[name])}."
        )
    root = Path(config.root).expanduser() if config.root else Path(torch.hub.get_dir(), "datasets")
    which = {"train": split == "train"} if name.startswith("CIFAR") else {"split": split}
    try:
        table = getattr(datasets, name)(root, download=True, **which)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"torchvision needs the package {error.name!r} to read {name}; install it: "
            f"pip install {error.name}"
        ) from error
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"torchvision:{name} is not in {root} and cannot be downloaded ({error}); connect "
            "once, or copy its files there (`data.root`)."
        ) from error
    return TorchvisionSource(
        name=f"torchvision:{name} ({split})",
        classes=list(table.classes),
        labels=_labels_of(table),
        table=table,
    )


def _labels_of(table: Any) -> list[int]:
    # CIFAR calls them `targets`; the other two keep them in `_labels` and offer nothing public.
    return list(table.targets if hasattr(table, "targets") else table._labels)
