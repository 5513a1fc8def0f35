"""Where images come from: each kind of source opens one image by its number."""

from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from pacatune.data.images.config import TORCHVISION_PREFIX, ImageDataConfig
from pacatune.data.images.decode import to_rgb

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
_EVALUATION_FOLDERS = ("test", "val", "valid", "validation")


@dataclass(kw_only=True)
class ImageSource:
    """Images with their classes; `open` decodes one."""

    name: str
    """For messages."""
    classes: list[str]
    labels: list[int]
    """Number of the class of each image."""
    warnings: list[str] = field(default_factory=list)

    @abstractmethod
    def place(self, index: int) -> str:
        """Return where an image comes from."""

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Open an image as it is stored."""

    def load(self, index: int) -> Image.Image:
        """Return an image in 8-bit RGB.

        Raises:
            ValueError: If it cannot be read; names it.
        """
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

    def place(self, index: int) -> str:
        """Return the number of the image, from 1."""
        return f"{self.name}, image {index + 1}"

    def open(self, index: int) -> Image.Image:
        """Return the image."""
        return self.table[index][0]  # type: ignore[no-any-return]


def read_sources(config: ImageDataConfig) -> tuple[ImageSource, ImageSource | None]:
    """Return the training images, and the evaluation images where they are given.

    Raises:
        FileNotFoundError: If a folder or data set does not exist or cannot be reached.
        ValueError: If it does not hold images with classes.
    """
    path, eval_path = config.path, config.eval_path
    folder = Path(path).expanduser()
    if folder.is_dir() and (found := find_split(folder)):
        path, eval_path = str(folder / "train"), eval_path or str(folder / found)
    train = read_source(config, path, config.split, "data.path")
    if eval_path is None and config.eval_split is None:
        return train, None
    split = config.eval_split or config.split
    return train, read_source(config, eval_path or path, split, "data.eval_path")


def read_source(config: ImageDataConfig, path: str, split: str | None, option: str) -> ImageSource:
    """Return the images of one folder or split; see `read_sources`."""
    if path.startswith(TORCHVISION_PREFIX):
        from pacatune.data.images.torchvision_sets import read_torchvision

        return read_torchvision(config, path.removeprefix(TORCHVISION_PREFIX), split)
    folder = Path(path).expanduser()
    if folder.is_dir():
        return read_folder(folder)
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        problem = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(
            f"{path} {problem}; `{option}` must be a folder with a folder of images per class."
        )
    from pacatune.data.images.hub import read_hub

    return read_hub(config, path, split or "train")


def read_folder(folder: Path) -> FolderSource:
    """Return the images below each class's folder; the folders' names are the classes.

    Raises:
        ValueError: If there is no class's folder, or one without images.
    """
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and _is_shown(path, folder))
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


def find_split(folder: Path) -> str | None:
    """Return the evaluation folder's name, if a folder holds `train` and that one alone."""
    names = {path.name for path in folder.iterdir() if path.is_dir() and _is_shown(path, folder)}
    found = [name for name in _EVALUATION_FOLDERS if names == {"train", name}]
    return found[0] if found else None


def _is_shown(path: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(root).parts)
