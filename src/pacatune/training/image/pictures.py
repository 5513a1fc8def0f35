"""confusion.png and mistakes.png."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from pacatune.data.images import ImageDataset
from pacatune.training.image.report import ImageReport, Mistake

# Beyond this many classes, names and numbers would not be readable.
_MOST_NAMES, _MOST_NUMBERS = 40, 20
_NUM_COLUMNS = 5


def draw_confusion(report: ImageReport, path: Path) -> None:
    """Draw the confusion matrix, coloured by the share of each class's images."""
    counts = np.array(report.confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    num = len(report.classes)
    size = min(max(4.0, 0.45 * num + 2), 16.0)
    figure = _figure(size, size)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="class", title=f"accuracy {report.accuracy_after:.3f}")
    if num <= _MOST_NAMES:
        axes.set_xticks(range(num), map(_short, report.classes), rotation=90)
        axes.set_yticks(range(num), map(_short, report.classes))
    if num <= _MOST_NUMBERS:
        for (row, column), number in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(number), ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axes, label="share of the class", shrink=0.7)
    figure.savefig(path, dpi=100)


def draw_mistakes(mistakes: list[Mistake], dataset: ImageDataset, path: Path) -> None:
    """Draw misclassified images as the model saw them, with class and prediction."""
    num_rows = math.ceil(len(mistakes) / _NUM_COLUMNS)
    figure = _figure(2.2 * _NUM_COLUMNS, 2.6 * num_rows)
    grid = list(figure.subplots(num_rows, _NUM_COLUMNS, squeeze=False).flat)
    for axes in grid:
        axes.set_axis_off()
    for axes, mistake in zip(grid, mistakes, strict=False):
        axes.imshow(dataset.preprocessing.crop(dataset.image(mistake.position)))
        text = f"{_short(mistake.label)}\n{_short(mistake.predicted)} {mistake.probability:.2f}?"
        axes.set_title(text, fontsize=9)
    figure.savefig(path, dpi=100)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _short(name: str) -> str:
    """Cut a class's name, and keep matplotlib from reading it as mathematics."""
    return (name if len(name) <= 18 else f"{name[:17]}…").replace("$", r"\$")
