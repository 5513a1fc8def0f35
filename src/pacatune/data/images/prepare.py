"""From a place to training and evaluation images that are known to be usable."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from pacatune.data.checks import overlap_warning, some
from pacatune.data.config import ImageDataConfig
from pacatune.data.images.sources import load_image, read_images


class PreparedImages(NamedTuple):
    """Images of a run, checked: tables with columns `image`, `label` and `place`."""

    train: Any
    evaluation: Any | None
    fingerprint: str
    """Hash of the training images, their classes and their order."""
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
    digests = None
    if config.check_images:
        digests, *others = check_images(train, *([evaluation] if evaluation else []))
        for other in others:
            warnings += overlap_warning(digests, other, "evaluation images")
    return PreparedImages(train, evaluation, images_digest(train, digests), warnings)


def class_names(table: Any) -> list[str]:
    """Return the names of the classes of images."""
    return list(table.features["label"].names)


def check_images(*tables: Any) -> list[list[str]]:
    """Decode images and return digests of the pixels by table.

    The ValueError names the images, of all tables, that cannot be read.
    """
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
