"""What a run on images achieved: accuracy, confusion matrix, misclassified images."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pacatune.training.report import Curve, RunReport

_MOST_CONFUSIONS = 10
# The largest class, as a multiple of the mean, up to which accuracies mean what they seem to.
_EVEN = 1.2


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One evaluation image that was taken for another class."""

    place: str
    """Where the image comes from."""
    label: str
    predicted: str
    probability: float
    """Of the predicted class."""
    position: int
    """Of the image among the evaluation images."""


@dataclass(kw_only=True)
class ImageReport(RunReport):
    """Results of one run on images."""

    loss_per: ClassVar[str] = "image"

    accuracy_before: float | None
    """Held-out accuracy before the first step, with the head as `head` says; None without data."""
    accuracy_after: float | None
    """Held-out accuracy of what was saved."""
    images_per_second: float
    """Training images of all processes, per second of steps."""
    head: Literal["new", "own"]
    """`new`: random before training, so `accuracy_before` is about chance. `own`: the model's."""
    classes: list[str]
    image_size: int
    confusion: list[list[int]]
    """Row: class of the image, column: predicted class; empty without evaluation images."""
    mistakes: list[Mistake]
    """Those of mistakes.png: the surest first."""
    eval_accuracies: Curve = field(default_factory=list)
    """(step, accuracy)."""

    def outcome(self) -> list[tuple[str, str]]:
        """Return accuracy, then loss."""
        chance = f" (new head; chance is {1 / len(self.classes):.3f})" if self.head == "new" else ""
        return [
            ("held-out accuracy before", _share(self.accuracy_before) + chance),
            ("held-out accuracy after", _share(self.accuracy_after) + self._remark()),
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


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
