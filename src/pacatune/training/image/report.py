"""What a run on images achieved: accuracy, confusion matrix, misclassified images."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from pacatune.reports.figures import new_figure, plain_text, save_figure
from pacatune.training.report import Curve, Report, four_digits

if TYPE_CHECKING:
    from pacatune.data.images import ImageDataset

NUM_MISTAKES = 25

_MOST_CONFUSIONS = 10
# The largest class, as a multiple of the mean, up to which accuracies mean what they seem to.
_EVEN = 1.2
# Beyond this many classes, names and numbers would not be readable.
_MOST_NAMES, _MOST_NUMBERS = 40, 20
_NUM_COLUMNS = 5


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One evaluation image that was taken for another class."""

    place: str
    """Where the image comes from."""
    label: str
    predicted: str
    probability: float
    """Probability of the predicted class."""
    position: int
    """Position among the evaluation images."""


@dataclass(kw_only=True)
class ImageReport(Report):
    """Results of one run on images."""

    accuracy_before: float | None = None
    """Held-out accuracy before the first step, with the head as `head` says; None without data."""
    accuracy_after: float | None = None
    """Held-out accuracy of what was saved."""
    images_per_second: float
    """Training images of all processes, per second of steps."""
    head: Literal["new", "own"]
    """`new`: random before training, so `accuracy_before` is about chance. `own`: the model's."""
    classes: list[str]
    image_size: int
    confusion: list[list[int]] = field(default_factory=list)
    """Row: class of the image, column: predicted class; empty without evaluation images."""
    mistakes: list[Mistake] = field(default_factory=list)
    """Those of mistakes.png: the surest first."""
    eval_accuracies: Curve = field(default_factory=list)
    """(step, accuracy)."""

    def outcome(self) -> list[tuple[str, str]]:
        """Return accuracy, then loss."""
        chance = f" (new head; chance is {1 / len(self.classes):.3f})" if self.head == "new" else ""
        return [
            ("held-out accuracy before", four_digits(self.accuracy_before) + chance),
            ("held-out accuracy after", four_digits(self.accuracy_after) + self._remark()),
            *super().outcome(),
        ]

    def _remark(self) -> str:
        """Say what knowing nothing but the most frequent class would reach, where that is much."""
        sizes = [sum(row) for row in self.confusion]
        if not sizes or max(sizes) * len(sizes) <= _EVEN * sum(sizes):
            return ""
        name, share = self.classes[sizes.index(max(sizes))], max(sizes) / sum(sizes)
        return f" (always {name!r}: {share:.4f})"

    def speed(self) -> tuple[str, str]:
        """Return images per second."""
        return "images per second", f"{self.images_per_second:,.1f}"

    def details(self) -> str:
        """Return the confusion matrix and the mistakes, as Markdown."""
        if not self.confusion:
            return "Nothing was held out, so no accuracy is known.\n\n"
        if not self.mistakes:
            return "![Confusion matrix](confusion.png)\n\nNo held-out image was misclassified.\n\n"
        rows = "".join(f"| {a} | {b} | {number} |\n" for number, a, b in self.confusions())
        return (
            "![Confusion matrix](confusion.png)\n\n"
            f"| class | taken for | images |\n|---|---|--:|\n{rows}\n"
            "The surest mistakes (class of the image, then what it was taken for, with its "
            "probability):\n\n![Misclassified images](mistakes.png)\n\n"
        )

    def confusions(self) -> list[tuple[int, str, str]]:
        """Return (images, class, predicted class), the most frequent confusions first."""
        pairs = [
            (number, self.classes[label], self.classes[predicted])
            for label, row in enumerate(self.confusion)
            for predicted, number in enumerate(row)
            if number and label != predicted
        ]
        return sorted(pairs, key=lambda pair: -pair[0])[:_MOST_CONFUSIONS]


def surest_mistakes(
    logits: NDArray[np.float32],
    labels: NDArray[np.int64],
    dataset: "ImageDataset",
    number: int = NUM_MISTAKES,
) -> list[Mistake]:
    """Return misclassified images, those first whose wrong class got the most probability.

    `logits` are (N, C), `labels` (N,), of the N images.
    """
    import torch

    sureness, predicted = torch.from_numpy(logits).double().softmax(-1).max(-1)
    order = sureness.argsort(descending=True, stable=True).tolist()
    classes, places = dataset.classes, dataset.table["place"][:]
    return [
        Mistake(
            place=places[position],
            label=classes[labels[position]],
            predicted=classes[predicted[position]],
            probability=float(sureness[position]),
            position=position,
        )
        for position in [one for one in order if predicted[one] != labels[one]][:number]
    ]


def draw_confusion(report: ImageReport, path: Path) -> None:
    """Draw the confusion matrix, coloured by the share of each class's images."""
    counts = np.array(report.confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    num = len(report.classes)
    size = min(max(4.0, 0.45 * num + 2), 16.0)
    figure = new_figure(size, size)
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
    save_figure(figure, path, dpi=100)


def draw_mistakes(mistakes: list[Mistake], dataset: "ImageDataset", path: Path) -> None:
    """Draw misclassified images as the model saw them, with class and prediction."""
    num_rows = math.ceil(len(mistakes) / _NUM_COLUMNS)
    figure = new_figure(2.2 * _NUM_COLUMNS, 2.6 * num_rows)
    grid = list(figure.subplots(num_rows, _NUM_COLUMNS, squeeze=False).flat)
    for axes in grid:
        axes.set_axis_off()
    for axes, mistake in zip(grid, mistakes, strict=False):
        axes.imshow(dataset.picture(mistake.position))
        text = f"{_short(mistake.label)}\n{_short(mistake.predicted)} {mistake.probability:.2f}?"
        axes.set_title(text, fontsize=9)
    save_figure(figure, path, dpi=100)


def _short(name: str) -> str:
    """Cut the name of a class."""
    return plain_text(name if len(name) <= 18 else f"{name[:17]}…")
