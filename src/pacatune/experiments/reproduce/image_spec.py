"""What Tables 6 and 7 differ in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pacatune.experiments.paper.tables import Table

__all__ = ["ImageTable"]


@dataclass(frozen=True, kw_only=True)
class ImageTable:
    """What distinguishes Table 6 from Table 7."""

    table: Table
    about: tuple[str, ...]
    task: str
    """Packaged task of a study."""
    small_model: str
    """What it is, for the reader."""
    num_steps: int
    """That it is trained for."""
    build: Callable[[], Any]
    """The paper's model with random weights."""
    model: str
    """Its name."""
    num_images: int
    image_size: int
    """Of the steps that are timed."""
    presets: dict[str, str]
    """Key of a score -> preset of `train-image`."""
    notes: tuple[str, ...] = ()
