import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pacatune.training.image.report import ImageReport, confusion_matrix, surest_mistakes
from pacatune.training.image.task import mix
from pacatune.training.trainer import accuracy


def batch():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(6, 3, 4, 4, generator=generator)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2, 2, 1, 0])}


def test_mixed_images_and_classes_have_the_same_shares():
    inputs = batch()
    torch.manual_seed(1)
    mixed = mix(inputs, alpha=0.4, num_classes=3)
    share, rest = mixed["labels"].max(1).values, mixed["labels"].sum(1)
    assert torch.allclose(rest, torch.ones(6))
    share = mixed["labels"][share < 1].flatten().unique()
    share = share[share > 0][0]
    classes = F.one_hot(inputs["labels"], 3).float()
    for mixture, label, own in zip(mixed["pixel_values"], mixed["labels"], range(6), strict=True):
        fits = [
            torch.allclose(mixture, w * inputs["pixel_values"][own] + (1 - w) * other, atol=1e-6)
            and torch.allclose(label, w * classes[own] + (1 - w) * its, atol=1e-6)
            for other, its in zip(inputs["pixel_values"], classes, strict=True)
            for w in (share, 1 - share)
        ]
        assert any(fits)


def test_mixed_loss_is_the_mean_of_both():
    inputs = batch()
    torch.manual_seed(1)
    mixed = mix(inputs, alpha=0.4, num_classes=3)
    logits = torch.randn(6, 3)
    torch.manual_seed(1)
    share = float(torch.distributions.Beta(0.4, 0.4).sample())
    partners = torch.randperm(6)
    both = [
        F.cross_entropy(logits, labels) for labels in (inputs["labels"], inputs["labels"][partners])
    ]
    expected = share * both[0] + (1 - share) * both[1]
    assert F.cross_entropy(logits, mixed["labels"]) == pytest.approx(float(expected), rel=1e-5)


class Prediction:
    predictions = np.array([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6]])
    label_ids = np.array([1, 1, 1])


def test_accuracy():
    assert accuracy(Prediction) == {"accuracy": pytest.approx(2 / 3)}


def test_confusion_matrix():
    labels, predicted = np.array([0, 0, 1, 2, 2]), np.array([0, 2, 1, 2, 0])
    assert confusion_matrix(labels, predicted, 3).tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    empty = np.array([], dtype=np.int64)
    assert confusion_matrix(empty, empty, 2).tolist() == [[0, 0], [0, 0]]


class Images:
    classes = ("cat", "dog")
    table = {"place": [f"{number}.png" for number in range(4)]}  # noqa: RUF012


def test_surest_mistakes_come_first():
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 5.0], [3.0, 0.0]], np.float32)
    labels = np.array([1, 0, 0, 0])
    first, second = surest_mistakes(logits, labels, Images, number=2)
    assert (first.place, first.label, first.predicted) == ("2.png", "cat", "dog")
    assert first.probability == pytest.approx(1 / (1 + np.exp(-5.0)))
    assert (second.position, second.label) == (0, "dog")
    assert len(surest_mistakes(logits, labels, Images)) == 3
    assert surest_mistakes(logits, np.array([0, 1, 1, 0]), Images) == []


def test_uneven_classes_put_the_accuracy_into_proportion():
    report = object.__new__(ImageReport)
    report.classes = ["a", "b", "c"]
    report.confusion = [[5, 0, 0], [0, 4, 1], [0, 0, 5]]
    assert report._remark() == ""
    report.confusion = [[2, 0, 0], [1, 16, 1], [0, 0, 5]]
    assert report._remark() == " (always 'b': 0.7200)"
    report.confusion = []  # nothing was held out
    assert report._remark() == ""


def test_most_frequent_confusions_come_first():
    report = object.__new__(ImageReport)
    report.classes, report.confusion = ["a", "b", "c"], [[5, 1, 0], [3, 4, 0], [0, 2, 9]]
    assert report.confusions() == [(3, "b", "a"), (2, "c", "b"), (1, "a", "b")]
