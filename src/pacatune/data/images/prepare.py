"""From a place to training and evaluation images that are known to be usable."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pacatune.data.checks import overlap_warning, some
from pacatune.data.config import ImageDataConfig
from pacatune.data.images.sources import load_image, read_images

# Resized to the model's height, an image of more would take gigabytes.
_MAX_ASPECT = 50
_MOST_THREADS = 32


@dataclass(frozen=True, kw_only=True)
class PreparedImages:
    """Images of a run, checked: tables with columns `image`, `label` and `place`."""

    classes: list[str]
    train: Any
    evaluation: Any | None
    fingerprint: str
    """Hash of the training images, their classes and their order."""
    warnings: list[str]
    """What is probably not meant, one sentence each."""


def prepare_images(config: ImageDataConfig) -> PreparedImages:
    """Find, split and check the images of a run."""
    train, evaluation, warnings = read_images(config)
    classes = class_names(train)
    if len(classes) < 2:
        raise ValueError(f"{config.path} has one class only, {classes[0]!r}; give at least two.")
    if evaluation is None:
        train, evaluation = _hold_out(train, config.eval_fraction, config.seed)
    else:
        evaluation = _align_classes(train, evaluation)
    train = _limit(train, config.train_per_class, config.seed)
    if evaluation is not None:
        evaluation = _limit(evaluation, config.eval_per_class, config.seed)
    empty = [name for name, count in zip(classes, _counts(train), strict=True) if not count]
    if empty:
        warnings.append(f"there are no training images of the class {some(empty)}.")
    digests = None
    if config.check_images:
        digests, *others = check_images(train, *([] if evaluation is None else [evaluation]))
        for other in others:
            warnings += overlap_warning(digests, other, "evaluation images")
    return PreparedImages(
        classes=classes,
        train=train,
        evaluation=evaluation,
        fingerprint=images_digest(train, digests),
        warnings=warnings,
    )


def class_names(table: Any) -> list[str]:
    """Return the names of the classes of images."""
    return list(table.features["label"].names)


def check_images(*tables: Any) -> list[list[str]]:
    """Decode images and return digests of the pixels by table.

    The ValueError names the images, of all tables, that cannot be read or are too narrow.
    """
    problems: list[str] = []

    def digest_of(table: Any, number: int) -> str:
        row = table[number]
        try:
            image = load_image(row)
        except ValueError as error:
            problems.append(str(error))
            return ""
        if max(image.size) > _MAX_ASPECT * min(image.size):
            problems.append(f"{row['place']}: {image.size} pixels are too narrow to resize")
        digest = hashlib.blake2b(str(image.size).encode(), digest_size=16)
        digest.update(image.tobytes())
        return digest.hexdigest()

    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
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


def _align_classes(train: Any, evaluation: Any) -> Any:
    """Number the classes of the evaluation images as those of the training images are."""
    names, others = class_names(train), class_names(evaluation)
    if strange := sorted({*names} ^ {*others}):
        raise ValueError(
            "training and evaluation images must have the same classes, but one of the two has no "
            f"{some(strange)}; rename or remove them."
        )
    labels = [names.index(others[label]) for label in evaluation["label"][:]]
    table = evaluation.remove_columns("label")
    return table.add_column("label", labels, feature=train.features["label"])


def _hold_out(table: Any, fraction: float, seed: int) -> tuple[Any, Any | None]:
    """Hold out a fraction of each class, at least as many images as classes; nothing with 0."""
    if not fraction:
        return table, None
    counts = _counts(table)
    if 1 in counts:
        raise ValueError(
            f"class {class_names(table)[counts.index(1)]!r} has one image, so none can be held "
            "out; add images, or set `data.eval_fraction` to 0."
        )
    num_classes = len(counts) - counts.count(0)
    number = min(max(round(len(table) * fraction), num_classes), len(table) - num_classes)
    parts = table.train_test_split(number, stratify_by_column="label", seed=seed)
    return parts["train"], parts["test"]


def _limit(table: Any, per_class: int | None, seed: int) -> Any:
    """Choose as many images of each class."""
    if per_class is None:
        return table
    order = np.random.default_rng(seed).permutation(len(table))
    labels = np.array(table["label"][:])[order]
    chosen = [order[labels == label][:per_class] for label in range(len(class_names(table)))]
    for name, rows in zip(class_names(table), chosen, strict=True):
        if len(rows) < per_class:
            raise ValueError(
                f"class {name!r} has {len(rows)} images to choose from; lower "
                f"`data.train_per_class` or `data.eval_per_class` ({per_class}) to that."
            )
    return table.select(np.sort(np.concatenate(chosen)))


def _counts(table: Any) -> list[int]:
    counts: list[int] = np.bincount(table["label"][:], minlength=len(class_names(table))).tolist()
    return counts
