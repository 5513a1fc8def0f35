"""Where images come from: each kind of source opens one image by its number."""

from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from pacatune.data.config import TORCHVISION_PREFIX, ImageDataConfig, refuse_split
from pacatune.data.read import is_image_folder, load_hub

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
# torchvision's data sets of the paper's Tables 6 and 7, and their splits; one trains on the first.
_SPLITS = {
    "CIFAR10": ("train", "test"),
    "CIFAR100": ("train", "test"),
    "OxfordIIITPet": ("trainval", "test"),
    "Flowers102": ("train", "val", "test"),
}
# The words by which `imagefolder` of the package datasets knows parts of a data set.
_PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an opened image upright, on white where it is transparent, in 8-bit RGB.

    Greyscale, palettes, CMYK and 16 bits are converted; Pillow alone would cut 16 bits off at 255
    and show whatever colour lies under transparent pixels.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"its pixels are {kind} of unknown range; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return image.convert("RGB")


@dataclass(kw_only=True)
class ImageSource:
    """Images with their classes; `open` decodes one."""

    name: str
    """For messages."""
    classes: list[str]
    labels: list[int]
    """Number of the class of each image."""
    warnings: list[str] = field(default_factory=list)

    def place(self, index: int) -> str:
        """Return where an image comes from, numbered from 1."""
        return f"{self.name}, image {index + 1}"

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Open an image as it is stored."""

    def load(self, index: int) -> Image.Image:
        """Return an image in 8-bit RGB; an error names it."""
        try:
            with self.open(index) as image:
                return to_rgb(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            # SyntaxError is what Pillow raises for some damaged files.
            raise ValueError(f"{self.place(index)}: {error}") from error


@dataclass(kw_only=True)
class FolderSource(ImageSource):
    """A folder with a folder of images per class."""

    files: list[Path]

    def place(self, index: int) -> str:
        """Return the path of the file."""
        return str(self.files[index])

    def open(self, index: int) -> Image.Image:
        """Open the file."""
        return Image.open(self.files[index])


@dataclass(kw_only=True)
class HubSource(ImageSource):
    """A data set of the hub, its images still encoded."""

    table: Any
    column: str

    def place(self, index: int) -> str:
        """Return the number of the row, from 1."""
        return f"{self.name}, row {index + 1}"

    def open(self, index: int) -> Image.Image:
        """Decode the row's image."""
        from datasets import Image as Decoder

        encoded = self.table[index][self.column]
        if encoded is None:
            raise ValueError("the row has no image")
        return Decoder().decode_example(encoded)  # type: ignore[no-any-return]


@dataclass(kw_only=True)
class TorchvisionSource(ImageSource):
    """One of torchvision's data sets."""

    table: Any

    def open(self, index: int) -> Image.Image:
        """Return the image."""
        return self.table[index][0]  # type: ignore[no-any-return]


def read_sources(config: ImageDataConfig) -> tuple[ImageSource, ImageSource | None]:
    """Return the training images, and the evaluation images where they are given."""
    path, eval_path = config.path, config.eval_path
    folder = Path(path).expanduser()
    parts = find_parts(folder) if folder.is_dir() else {}
    if config.eval_split is not None:
        refuse_split(eval_path or path, "data.eval_split", config.eval_split)
    if parts:
        path = str(parts.pop("train"))
        if eval_path is None and parts:
            eval_path = str(parts.pop("validation" if "validation" in parts else "test"))
    train = read_source(config, path, config.split, "data.path")
    train.warnings += [f"{part} is not used." for part in parts.values()]
    if eval_path is None and config.eval_split is None:
        return train, None
    split = config.eval_split or config.split
    return train, read_source(config, eval_path or path, split, "data.eval_path")


def read_source(config: ImageDataConfig, path: str, split: str | None, option: str) -> ImageSource:
    """Return the images of one folder or split; see `read_sources`."""
    if path.startswith(TORCHVISION_PREFIX):
        return read_torchvision(config, path.removeprefix(TORCHVISION_PREFIX), split)
    if is_image_folder(path, option):
        return read_folder(Path(path).expanduser())
    return read_hub(config, path, split or "train")


def read_folder(folder: Path) -> FolderSource:
    """Return the images below each class's folder; the folders' names are the classes."""
    folders = _folders(folder)
    if not folders:
        raise ValueError(
            f"{folder} holds no folders; put the images of each class into a folder of its name."
        )
    files: list[Path] = []
    labels: list[int] = []
    others = [path for path in folder.iterdir() if path.is_file() and _is_shown(path, folder)]
    empty = []
    for label, class_folder in enumerate(folders):
        found = [p for p in class_folder.rglob("*") if p.is_file() and _is_shown(p, folder)]
        images = sorted(path for path in found if path.suffix.lower() in SUFFIXES)
        others += sorted(set(found) - set(images))
        if not images:
            empty.append(class_folder.name)
        files += images
        labels += [label] * len(images)
    if empty:
        raise ValueError(
            f"{folder}: no images ({', '.join(SUFFIXES)}) in the folder of the class "
            f"{', '.join(map(repr, empty[:5]))}; put some there, or remove the folder."
        )
    warnings = []
    if others:
        shown = ", ".join(str(path) for path in others[:3])
        warnings.append(f"{len(others)} files are no images of a class and left out: {shown}.")
    return FolderSource(
        name=str(folder),
        classes=[path.name for path in folders],
        labels=labels,
        files=files,
        warnings=warnings,
    )


def find_parts(folder: Path) -> dict[str, Path]:
    """Return the folders of train, validation and test, if there are those and not classes."""
    parts: dict[str, Path] = {}
    others, problem = [], ""
    for path in _folders(folder):
        part = _PARTS.get(path.name.lower())
        if part is None:
            others.append(path.name)
        elif part in parts:
            problem = f"{parts[part].name} and {path.name} are both {part}"
        else:
            parts[part] = path
    if not parts or (others and not any(map(_folders, parts.values()))):
        return {}
    names = ", ".join(path.name for path in parts.values())
    if others:
        problem = f"it has the folder {others[0]} beside the parts {names}"
    elif "train" not in parts:
        problem = f"the folders {names} are parts of a data set, and none of them is train"
    elif not _folders(parts["train"]):
        problem = f"{parts['train'].name}, a part of a data set, holds no folder per class"
    if problem:
        raise ValueError(
            f"{folder}: {problem}; give each part by itself (`data.path`, `data.eval_path`), or "
            "rename the folders where they are classes."
        )
    return parts


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and _is_shown(path, folder))


def _is_shown(path: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(root).parts)


def read_hub(config: ImageDataConfig, path: str, split: str) -> HubSource:
    """Load a split of a data set, its images still encoded."""
    from datasets import ClassLabel, Image, Value

    table = load_hub(path, config.name, split, "data.path")
    images = [name for name, kind in table.features.items() if isinstance(kind, Image)]
    column = _choose(images, config.image_column, table, path, "image_column", "images")
    kinds = {name: kind for name, kind in table.features.items() if name != column}
    named = [name for name, kind in kinds.items() if isinstance(kind, ClassLabel)]
    plain = [name for name, kind in kinds.items() if isinstance(kind, Value)]
    label = _choose(named or plain, config.label_column, table, path, "label_column", "classes")
    classes, labels = _read_classes(table, label)
    encoded = table.cast_column(column, Image(decode=False)).select_columns([column])
    return HubSource(
        name=f"{path} ({split})", classes=classes, labels=labels, table=encoded, column=column
    )


def _choose(
    found: list[str], given: str | None, table: Any, path: str, option: str, what: str
) -> str:
    if given is not None and given in table.column_names:
        return given
    if given is None and len(found) == 1:
        return found[0]
    problem = f"no column {given!r}" if given else f"{len(found)} columns that could hold {what}"
    raise ValueError(
        f"{path} has {problem}; set `data.{option}` to one of {', '.join(table.column_names)}."
    )


def _read_classes(table: Any, label: str) -> tuple[list[str], list[int]]:
    values = table[label][:]
    if None in values or -1 in values:
        missing = next(i for i, value in enumerate(values) if value in (None, -1))
        raise ValueError(
            f"row {missing + 1} has no class in {label!r}; give data whose every row has one."
        )
    names = getattr(table.features[label], "names", None)
    if names is not None:
        return list(names), list(values)
    classes = sorted(set(values))
    numbers = {value: number for number, value in enumerate(classes)}
    return [str(value) for value in classes], [numbers[value] for value in values]


def read_torchvision(config: ImageDataConfig, name: str, split: str | None) -> TorchvisionSource:
    """Return one split of a data set of torchvision, downloaded where it is missing."""
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
        # CIFAR calls them `targets`; the other two keep them in `_labels` and offer nothing public.
        labels=list(table.targets if hasattr(table, "targets") else table._labels),
        table=table,
    )
