"""Images of classes: where they come from, what is held out, and how a model sees them.

A table of the package datasets has columns `image` (a path, or bytes as they are stored), `label`
and `place`, for messages.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Features, Value
from datasets import Image as Decoder
from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from pacatune.data.checks import overlap_warning, some
from pacatune.data.config import ImageDataConfig, SourceConfig
from pacatune.data.formats import open_image
from pacatune.data.read import class_folders, is_local, load_hub, named
from pacatune.names import choose

# torchvision's data sets of the paper's Tables 6 and 7, and their splits.
_SPLITS = {
    "CIFAR10": ("train", "test"),
    "CIFAR100": ("train", "test"),
    "OxfordIIITPet": ("trainval", "test"),
    "Flowers102": ("train", "val", "test"),
}


def load_image(row: dict[str, Any]) -> Image.Image:
    """Decode the image of a row, in 8-bit RGB; an error names it."""
    with named(row["place"]):
        if row["image"] is None:
            raise ValueError("the row has no image")
        return open_image(row["image"])


def read_images(config: ImageDataConfig) -> tuple[Any, Any | None, list[str]]:
    """Return the training images, those of evaluation where they are given, and warnings."""
    (source, option), evaluation = config.sources()[0], config.evaluation_source()
    if parts := find_parts(source.path):
        source = replace(source, path=parts.pop("train"))
        if evaluation is None and (parts.keys() & {"validation", "test"}):
            other = parts.pop("validation", None) or parts.pop("test")
            evaluation = replace(source, path=other), option
    train = _read(config, source, option)
    held_out = evaluation and _read(config, *evaluation)
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


def _read(config: ImageDataConfig, source: SourceConfig, option: str) -> Any:
    path, split = source.path, source.split
    if path.startswith("torchvision:"):
        return read_torchvision(config, path.removeprefix("torchvision:"), split)
    if is_local(path, option, split, source.name):
        return read_folder(Path(path).expanduser().absolute())
    return read_hub(config, path, split, option)


def read_folder(folder: Path) -> Any:
    """Return the images in each class's folder; the folders' names are the classes."""
    found = {one: _files(one) for one in class_folders(folder)}
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
    return datasets.Dataset.from_list(rows, features)


def read_hub(config: ImageDataConfig, path: str, split: str, option: str = "data.path") -> Any:
    """Load a split of a data set of the hub."""
    table = load_hub(path, config.name, split, option)
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
    return _complete(datasets.Dataset.from_dict({"image": images}), labels, kind, place)


class PreparedImages(NamedTuple):
    """Images of a run, checked: tables with columns `image`, `label` and `place`."""

    train: Any
    evaluation: Any | None
    fingerprint: str
    """Hash of the images, their classes and their order."""
    warnings: list[str]


def prepare_images(config: ImageDataConfig) -> PreparedImages:
    """Find, split and check the images of a run."""
    train, evaluation, warnings = read_images(config)
    classes = class_names(train)
    if len(classes) < 2:
        raise ValueError(f"{config.path} has one class only, {classes[0]!r}; give at least two.")
    if evaluation is None and config.eval_fraction:  # of each class, and at least one in the mean
        number = max(round(len(train) * config.eval_fraction), len(set(train["label"])))
        parts = train.train_test_split(number, stratify_by_column="label", seed=config.seed)
        train, evaluation = parts["train"], parts["test"]
    elif evaluation is not None and class_names(evaluation) != classes:
        strange = sorted({*class_names(evaluation)} ^ {*classes}) or classes
        raise ValueError(
            "training and evaluation images must have the same classes in the same order, and do "
            f"not have {some(strange)} in common; rename or remove them."
        )
    train = _limit(train, config.train_per_class, config.seed)
    evaluation = evaluation and _limit(evaluation, config.eval_per_class, config.seed)
    digests, others = None, list[Any]()
    if config.check_images:
        digests, *others = check_images(train, *([evaluation] if evaluation else []))
        for other in others:
            warnings += overlap_warning(digests, other, "evaluation images")
    fingerprint = images_digest(train, digests)
    if evaluation is not None:
        fingerprint += images_digest(evaluation, others[0] if config.check_images else None)
    return PreparedImages(train, evaluation, fingerprint, warnings)


def class_names(table: Any) -> list[str]:
    """Return the names of the classes of images."""
    return list(table.features["label"].names)


def check_images(*tables: Any) -> list[list[str]]:
    """Decode images and return digests of the pixels by table; refuse what cannot be read."""
    problems: list[str] = []

    def digest_of(table: Any, number: int) -> str:
        row = table[number]
        try:
            image = load_image(row)
        except ValueError as error:
            problems.append(str(error))
            return ""
        digest = hashlib.blake2b(str(image.size).encode(), digest_size=16)
        digest.update(image.tobytes())
        return digest.hexdigest()

    with ThreadPoolExecutor() as pool:
        found = [list(pool.map(partial(digest_of, one), range(len(one)))) for one in tables]
    if problems:
        raise ValueError(
            f"{len(problems)} of {sum(map(len, tables))} images cannot be used: "
            f"{some(sorted(problems))}. Replace or remove them."
        )
    return found


def images_digest(table: Any, digests: Sequence[str] | None) -> str:
    """Return a digest of these images in this order, their pixels (or places) and classes."""
    digest = hashlib.blake2b("\0".join(class_names(table)).encode(), digest_size=16)
    for label, text in zip(table["label"][:], digests or table["place"][:], strict=True):
        digest.update(f"\0{label} {text}".encode())
    return digest.hexdigest()


def _limit(table: Any, per_class: int | None, seed: int) -> Any:
    """Choose as many images of each class."""
    if per_class is None:
        return table
    order = np.random.default_rng(seed).permutation(len(table))
    labels = np.array(table["label"][:])[order]
    chosen = [order[labels == label][:per_class] for label in range(len(class_names(table)))]
    if (fewest := min(map(len, chosen))) < per_class:
        raise ValueError(
            f"a class has {fewest} images to choose from; lower `data.train_per_class` or "
            f"`data.eval_per_class` ({per_class}) to that."
        )
    return table.select(np.sort(np.concatenate(chosen)))


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
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self._seed, epoch, index)) % 2**63)
            return self._transform(image)  # type: ignore[no-any-return]


class ImageDataset(Dataset[dict[str, Any]]):
    """Images of a table of classes, transformed by the model's own image processor."""

    def __init__(
        self, table: Any, processor: Any, augmentation: Augmentation | None = None
    ) -> None:
        self.table = table
        self.classes = class_names(table)
        self.processor = processor
        self.augmentation = augmentation
        # Set at the start of each: images are augmented anew. Shared with workers that stay.
        self.epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()

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
