"""Which images a run got wrong: numbers, Markdown and pictures."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pacatune.data.images import ImageDataset
from pacatune.reports.figures import new_figure, plain_text, save_figure
from pacatune.reports.rows import Table

_MOST_MISTAKES, _MOST_CONFUSIONS = 25, 10
_NUM_COLUMNS = 5  # of mistakes
_MOST_CLASSES = 40  # whose names and numbers can be read


def compare(logits: Any, labels: Any, dataset: ImageDataset) -> dict[str, Any]:
    """Return the confusion matrix, and the mistakes whose wrong class got the most probability.

    `logits` are (N, C), `labels` (N,), of the N images. Row of the matrix: class of the image;
    column: predicted class.
    """
    classes, places = dataset.classes, dataset.table["place"][:]
    counts = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(counts, (labels, logits.argmax(axis=1)), 1)
    sureness, predicted = torch.from_numpy(logits).double().softmax(-1).max(-1)
    order = sureness.argsort(descending=True, stable=True).tolist()
    mistakes = [
        {
            "place": places[position],
            "label": classes[labels[position]],
            "predicted": classes[predicted[position]],
            "probability": float(sureness[position]),
            "position": position,
        }
        for position in order
        if predicted[position] != labels[position]
    ]
    return {"confusion": counts.tolist(), "mistakes": mistakes[:_MOST_MISTAKES]}


def describe(classes: list[str], confusion: list[list[int]]) -> str:
    """Return as Markdown what was confused most often, with the pictures."""
    if not confusion:
        return "Nothing was held out, so no accuracy is known.\n\n"
    pairs = [
        (number, classes[label], classes[predicted])
        for (label, predicted), number in np.ndenumerate(confusion)
        if number and label != predicted
    ]
    text = "![Confusion matrix](confusion.png)\n\n"
    if not pairs:
        return f"{text}No held-out image was misclassified.\n\n"
    pairs = sorted(pairs, key=lambda pair: -pair[0])[:_MOST_CONFUSIONS]
    cells = [[a, b, str(number)] for number, a, b in pairs]
    shown = Table(header=["class", "taken for", "images"], cells=cells, num_index=2).markdown()
    rows = "\n".join(shown)
    return (
        f"{text}{rows}\n\n"
        "The surest mistakes (class of the image, then what it was taken for, with its "
        "probability):\n\n![Misclassified images](mistakes.png)\n\n"
    )


def draw_confusion(confusion: list[list[int]], classes: list[str], folder: Path) -> None:
    """Draw the confusion matrix, coloured by the share of each class's images."""
    counts, num = np.array(confusion), len(classes)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(max(4.0, 0.45 * num + 2), 16.0)
    figure = new_figure(size, size)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    accuracy = counts.trace() / counts.sum()
    axes.set(xlabel="predicted", ylabel="class", title=f"accuracy {accuracy:.3f}")
    if num <= _MOST_CLASSES:
        axes.set_xticks(range(num), map(_short, classes), rotation=90)
        axes.set_yticks(range(num), map(_short, classes))
        for (row, column), number in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(number), ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axes, label="share of the class", shrink=0.7)
    save_figure(figure, folder / "confusion.png", dpi=100)


def draw_mistakes(mistakes: list[dict[str, Any]], dataset: ImageDataset, folder: Path) -> None:
    """Draw misclassified images, if any, as the model saw them, with class and prediction."""
    if not mistakes:
        return
    num_rows = math.ceil(len(mistakes) / _NUM_COLUMNS)
    figure = new_figure(2.2 * _NUM_COLUMNS, 2.6 * num_rows)
    grid = list(figure.subplots(num_rows, _NUM_COLUMNS, squeeze=False).flat)
    for axes in grid:
        axes.set_axis_off()
    for axes, one in zip(grid, mistakes, strict=False):
        axes.imshow(dataset.picture(one["position"]))
        guess = f"{_short(one['predicted'])} {one['probability']:.2f}?"
        axes.set_title(f"{_short(one['label'])}\n{guess}", fontsize=9)
    save_figure(figure, folder / "mistakes.png", dpi=100)


def _short(name: str) -> str:
    """Cut the name of a class."""
    return plain_text(name if len(name) <= 18 else f"{name[:17]}…")
