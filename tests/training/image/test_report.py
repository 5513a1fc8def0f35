import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pacatune.training.image.report import ImageReport, surest_mistakes
from pacatune.training.image.task import mix
from pacatune.training.trainer import accuracy


def test_images_are_mixed_in_the_shares_of_their_classes():
    pixels, labels = torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, 2, 1, 0])
    mixed = mix({"labels": labels, "pixel_values": pixels}, alpha=0.4, num_classes=3)
    classes = F.one_hot(labels, 3).float()
    share = mixed["labels"][1, 1]  # its partner is of another class
    assert 0 < share < 1
    for values, name in ((pixels, "pixel_values"), (classes, "labels")):
        expected = share * values + (1 - share) * values.roll(1, 0)
        torch.testing.assert_close(mixed[name], expected)


class Prediction:
    predictions = np.array([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6]])
    label_ids = np.array([1, 1, 1])


def test_accuracy():
    assert accuracy(Prediction) == {"accuracy": pytest.approx(2 / 3)}


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
