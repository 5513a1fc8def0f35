"""From logits to a confusion matrix and the surest mistakes."""

import numpy as np
from numpy.typing import NDArray

from pacatune.data.images import ImageDataset
from pacatune.training.image.report import Mistake

NUM_MISTAKES = 25


def confusion_matrix(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], num_classes: int
) -> NDArray[np.int64]:
    """Count (C, C) pairs: row the class of an image (N,), column the predicted one (N,)."""
    pairs = labels * num_classes + predicted
    counts = np.bincount(pairs, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def surest_mistakes(
    logits: NDArray[np.float32],
    labels: NDArray[np.int64],
    dataset: ImageDataset,
    number: int = NUM_MISTAKES,
) -> list[Mistake]:
    """Return misclassified images, those first whose wrong class got the most probability.

    Args:
        logits: (N, C).
        labels: (N,).
        dataset: The N images.
        number: At most as many.
    """
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    predicted = logits.argmax(axis=1)
    sureness = probabilities[np.arange(len(labels)), predicted]
    wrong = np.flatnonzero(predicted != labels)
    chosen = wrong[np.argsort(-sureness[wrong], kind="stable")][:number]
    classes = dataset.source.classes
    return [
        Mistake(
            place=dataset.place(int(position)),
            label=classes[labels[position]],
            predicted=classes[predicted[position]],
            probability=float(sureness[position]),
            position=int(position),
        )
        for position in chosen
    ]
