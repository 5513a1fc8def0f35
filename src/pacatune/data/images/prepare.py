"""From a place to training and evaluation images that are known to be usable."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from pacatune.data.checks import overlap_warning, some
from pacatune.data.config import ImageDataConfig
from pacatune.data.images.sources import ImageSource, read_sources

# Resized to the model's height, an image of more would take gigabytes.
_MAX_ASPECT = 50
_MOST_THREADS = 32


@dataclass(frozen=True, kw_only=True)
class ImagePart:
    """Some images of a source."""

    source: ImageSource
    indices: list[int]


@dataclass(frozen=True, kw_only=True)
class PreparedImages:
    """Images of a run, checked."""

    classes: list[str]
    train: ImagePart
    evaluation: ImagePart | None
    fingerprint: str
    """Hash of the training images, their classes and their order."""
    warnings: list[str]
    """What is probably not meant, one sentence each."""


def check_images(*parts: ImagePart) -> list[list[str]]:
    """Decode images and return digests of the pixels by part.

    The ValueError names the images, of all parts, that cannot be read or are too narrow.
    """

    def examine(pair: tuple[ImageSource, int]) -> tuple[str, str]:
        """Return the digest and what is wrong; one of them is empty."""
        source, index = pair
        try:
            image = source.load(index)
        except ValueError as error:
            return "", str(error)
        width, height = image.size
        if max(width, height) > _MAX_ASPECT * min(width, height):
            return "", f"{source.place(index)}: {width} x {height} pixels are too narrow to resize"
        digest = hashlib.blake2b(f"{width} {height} ".encode(), digest_size=16)
        digest.update(image.tobytes())
        return digest.hexdigest(), ""

    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        pairs = [(part.source, index) for part in parts for index in part.indices]
        results = list(pool.map(examine, pairs))
    problems = [problem for _, problem in results if problem]
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(results)} images cannot be used: "
            f"{some(problems)}. Replace or remove them."
        )
    digests = iter(results)
    return [[next(digests)[0] for _ in part.indices] for part in parts]


def run_digest(part: ImagePart, digests: Sequence[str] | None) -> str:
    """Return a digest of these images in this order, their pixels (or places) and classes."""
    source = part.source
    found = digests or [source.place(index) for index in part.indices]
    digest = hashlib.blake2b("\0".join(source.classes).encode(), digest_size=16)
    for index, text in zip(part.indices, found, strict=True):
        digest.update(f"\0{source.labels[index]} {text}".encode())
    return digest.hexdigest()


def prepare_images(config: ImageDataConfig) -> PreparedImages:
    """Find, split and check the images of a run."""
    source, eval_source = read_sources(config)
    _check_classes(source)
    if eval_source is not None:
        _align_classes(source, eval_source)
        indices, held_out = list(range(len(source.labels))), list(range(len(eval_source.labels)))
    else:
        indices, held_out = _hold_out(source, config.eval_fraction, config.seed)
    eval_source = eval_source or source
    indices = _limit(source, indices, config.train_per_class, config.seed)
    held_out = _limit(eval_source, held_out, config.eval_per_class, config.seed)
    train = ImagePart(source=source, indices=indices)
    evaluation = ImagePart(source=eval_source, indices=held_out) if held_out else None
    warnings = [*source.warnings, *(eval_source.warnings if eval_source is not source else [])]
    digests = None
    if config.check_images:
        digests, *others = check_images(train, *([evaluation] if evaluation else []))
        for other in others:
            warnings += overlap_warning(digests, other, "evaluation images")
    return PreparedImages(
        classes=source.classes,
        train=train,
        evaluation=evaluation,
        fingerprint=run_digest(train, digests),
        warnings=warnings,
    )


def _check_classes(source: ImageSource) -> None:
    if len(source.classes) < 2:
        raise ValueError(
            f"{source.name} has one class only ({source.classes[0]!r}); a classifier needs at "
            "least two. Give the folder above, with a folder per class."
        )
    used = set(source.labels)
    empty = [name for label, name in enumerate(source.classes) if label not in used]
    if empty:
        source.warnings.append(f"{source.name} has no images of the class {_some(empty)}.")


def _align_classes(source: ImageSource, eval_source: ImageSource) -> None:
    """Number the classes of the evaluation images as those of the training images are."""
    only_train = [name for name in source.classes if name not in eval_source.classes]
    only_eval = [name for name in eval_source.classes if name not in source.classes]
    if only_train or only_eval:
        raise ValueError(
            f"{source.name} and {eval_source.name} must have the same classes, but "
            f"{_some(only_train)} only in the first and {_some(only_eval)} only in the other. "
            "Rename or remove them."
        )
    numbers = [source.classes.index(name) for name in eval_source.classes]
    eval_source.labels = [numbers[label] for label in eval_source.labels]
    eval_source.classes = source.classes


def _hold_out(source: ImageSource, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Hold out a fraction of each class, at least one image and never all; nothing with 0."""
    indices = list(range(len(source.labels)))
    if not fraction:
        return indices, []

    def number_of(name: str, available: int) -> int:
        if available == 1:
            raise ValueError(
                f"class {name!r} of {source.name} has one image, so none can be held "
                "out; add images, or set `data.eval_fraction` to 0."
            )
        return min(max(1, round(available * fraction)), available - 1)

    held_out, rest = _draw(source, indices, seed, number_of)
    return rest, held_out


def _limit(source: ImageSource, indices: list[int], per_class: int | None, seed: int) -> list[int]:
    """Choose as many images of each class."""
    if per_class is None or not indices:
        return indices

    def number_of(name: str, available: int) -> int:
        if available < per_class:
            raise ValueError(
                f"class {name!r} of {source.name} has {available} images to choose from; lower "
                f"`data.train_per_class` or `data.eval_per_class` ({per_class}) to that."
            )
        return per_class

    return _draw(source, indices, seed, number_of)[0]


def _draw(
    source: ImageSource, indices: Sequence[int], seed: int, number_of: Callable[[str, int], int]
) -> tuple[list[int], list[int]]:
    """Draw a number of images of each class, given its name and size; return them and the rest."""
    members: dict[str, list[int]] = {name: [] for name in source.classes}
    for index in indices:
        members[source.classes[source.labels[index]]].append(index)
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = []
    for name, found in members.items():
        number = number_of(name, len(found))
        order = torch.randperm(len(found), generator=generator).tolist()
        drawn += [found[place] for place in order[:number]]
    return sorted(drawn), sorted(set(indices) - set(drawn))


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:5])) or "none"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
