"""Where images come from: a table of the package datasets, whatever the place.

Its columns are `image` (a path, or bytes as they are stored), `label` and `place`, for messages.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as Decoder
from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image, ImageOps

from pacatune.data.checks import some
from pacatune.data.config import TORCHVISION_PREFIX, ImageDataConfig
from pacatune.data.read import is_local, load_hub
from pacatune.names import choose

# torchvision's data sets of the paper's Tables 6 and 7, and their splits.
_SPLITS = {
    "CIFAR10": ("train", "test"),
    "CIFAR100": ("train", "test"),
    "OxfordIIITPet": ("trainval", "test"),
    "Flowers102": ("train", "val", "test"),
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
        raise ValueError("its pixels have an unknown range; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return image.convert("RGB")


def load_image(row: dict[str, Any]) -> Image.Image:
    """Decode the image of a row, in 8-bit RGB; an error names it."""
    try:
        stored = row["image"]
        if stored is None:
            raise ValueError("the row has no image")
        if stored["bytes"] is None and Path(stored["path"]).is_file():  # a decoder keeps it open
            stored = {"bytes": Path(stored["path"]).read_bytes(), "path": None}
        return to_rgb(Decoder().decode_example(stored))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # SyntaxError is what Pillow raises for some damaged files.
        raise ValueError(f"{row['place']}: {error}") from error


def read_images(config: ImageDataConfig) -> tuple[Any, Any | None, list[str]]:
    """Return the training images, those of evaluation where they are given, and warnings."""
    path, split, evaluation = config.path, config.split, config.evaluation_source()
    eval_path = evaluation and evaluation[0].path
    if parts := find_parts(path):
        path = parts.pop("train")
        eval_path = eval_path or parts.pop("validation", None) or parts.pop("test", None)
    train, held_out = _read(config, path, split, "data.path"), None
    if eval_path:
        held_out = _read(config, eval_path, config.eval_split or split, "data.eval_path")
    return train, held_out, [f"{part} is not used." for part in parts.values()]


def find_parts(path: str) -> dict[str, str]:
    """Return the folders of train, validation and test, if a folder holds those and no classes."""
    folders = _folders(Path(path).expanduser())
    known = {word: str(part) for part, words in SPLIT_KEYWORDS.items() for word in words}
    parts = {known.get(folder.name.lower(), ""): str(folder) for folder in folders}
    return {} if "" in parts or "train" not in parts or len(parts) < len(folders) else parts


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.name[0] != ".")


def _folders(folder: Path) -> list[Path]:
    return [path for path in _files(folder) if path.is_dir()]


def _read(config: ImageDataConfig, path: str, split: str, option: str) -> Any:
    if path.startswith(TORCHVISION_PREFIX):
        return read_torchvision(config, path.removeprefix(TORCHVISION_PREFIX), split)
    if is_local(path, option):
        return read_folder(Path(path).expanduser().absolute())
    return read_hub(config, path, split)


def read_folder(folder: Path) -> Any:
    """Return the images in each class's folder; the folders' names are the classes."""
    found = {one: _files(one) for one in _folders(folder)}
    if not found:
        raise ValueError(
            f"{folder} holds no folders; put the images of each class into a folder of its name."
        )
    rows, strange = [], []
    for label, (one, files) in enumerate(found.items()):
        images = [file for file in files if file.suffix.lower() in ImageFolder.EXTENSIONS]
        places = list(map(str, images))
        rows += [{"image": {"path": p, "bytes": None}, "label": label, "place": p} for p in places]
        strange += [file.name for file in files if file.is_dir()] + [one.name] * (not images)
    if strange:
        raise ValueError(
            f"{folder}: images must lie right in the folders of their classes, some in each and "
            f"none deeper; mend or remove {some(sorted(strange))}."
        )
    kind = ClassLabel(names=[one.name for one in found])
    features = Features(image=Decoder(decode=False), label=kind, place=Value("string"))
    return Dataset.from_list(rows, features)


def read_hub(config: ImageDataConfig, path: str, split: str) -> Any:
    """Load a split of a data set of the hub."""
    table = load_hub(path, config.name, split, "data.path")
    image = _choose(table, "image_column", config.image_column, Decoder)
    label = _choose(table, "label_column", config.label_column, ClassLabel, Value)
    labels = table.select_columns([label])
    if not isinstance(labels.features[label], ClassLabel):
        labels = labels.class_encode_column(label)
    numbers = labels[label][:]
    if missing := [row for row, number in enumerate(numbers, 1) if number in (None, -1)]:
        raise ValueError(
            f"row {missing[0]} has no class in {label!r}; give data whose every row has one."
        )
    table = table.select_columns([image]).rename_columns({image: "image"})
    return _complete(table, numbers, labels.features[label], f"{path} ({split}), row")


def _complete(table: Any, labels: list[int], kind: Any, place: str) -> Any:
    """Leave the images of a table encoded, and add their classes and places."""
    table = table.cast_column("image", Decoder(decode=False))
    table = table.add_column("label", labels, feature=kind)
    return table.add_column("place", [f"{place} {number + 1}" for number in range(len(table))])


def _choose(table: Any, option: str, given: str | None, *kinds: type) -> str:
    """Return the column that is given, or the only one of the first kind that there is."""
    if given is not None:
        return choose(given, table.column_names, option=f"data.{option}")
    names = [[n for n, one in table.features.items() if type(one) is kind] for kind in kinds]
    found = next(filter(None, names), [])
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} columns could be meant ({', '.join(found)}); set `data.{option}` to one "
            f"of {', '.join(table.column_names)}."
        )
    return str(found[0])


def read_torchvision(config: ImageDataConfig, name: str, split: str) -> Any:
    """Return one split of a data set of torchvision, downloaded where it is missing."""
    import torchvision

    name = choose(name, _SPLITS, option="data.path torchvision:")
    split = "trainval" if (name, split) == ("OxfordIIITPet", "train") else split
    split = choose(split, _SPLITS[name], option="data.split")
    root = Path(config.root).expanduser() if config.root else Path(torch.hub.get_dir(), "datasets")
    is_cifar = name.startswith("CIFAR")
    which = {"train": split == "train"} if is_cifar else {"split": split}
    try:
        data = getattr(torchvision.datasets, name)(root, download=True, **which)
    except (ImportError, OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"torchvision:{name} is not in {root} and cannot be downloaded ({error}); connect "
            "once, install what is missing, or copy its files there (`data.root`)."
        ) from error
    labels = data.targets if is_cifar else data._labels
    if is_cifar:
        images = [b"P6 32 32 255\n" + pixels.tobytes() for pixels in data.data]  # as PPM files
    else:  # torchvision offers their paths and labels not in public
        images = list(map(str, data._images if name == "OxfordIIITPet" else data._image_files))
    place = f"torchvision:{name} ({split}), image"
    kind = ClassLabel(names=list(data.classes))
    return _complete(Dataset.from_dict({"image": images}), labels, kind, place)
