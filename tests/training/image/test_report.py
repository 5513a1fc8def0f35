from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pacatune.training.image.report import compare, describe
from pacatune.training.image.task import ImageTrainer
from pacatune.training.trainer import RunTrainer, accuracy


def test_images_are_mixed_in_the_shares_of_their_classes(monkeypatch):
    pixels, labels = torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, 2, 1, 0])
    trainer = object.__new__(ImageTrainer)
    trainer.args = SimpleNamespace(mixup_alpha=0.4, train_batch_norm=True)
    trainer.model = SimpleNamespace(training=True, config=SimpleNamespace(num_labels=3))
    monkeypatch.setattr(RunTrainer, "compute_loss", lambda self, model, inputs: inputs)
    mixed = trainer.compute_loss(trainer.model, {"labels": labels, "pixel_values": pixels})
    classes = F.one_hot(labels, 3).float()
    share = mixed["labels"][1, 1]  # its partner is of another class
    assert 0 < share < 1
    for values, name in ((pixels, "pixel_values"), (classes, "labels")):
        expected = share * values + (1 - share) * values.roll(1, 0)
        torch.testing.assert_close(mixed[name], expected)


def test_surest_mistakes_come_first():
    places = {"place": [f"{number}.png" for number in range(4)]}
    images = SimpleNamespace(classes=("cat", "dog"), table=places)
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 5.0], [3.0, 0.0]], np.float32)
    found = compare(logits, np.array([1, 0, 0, 0]), images)
    first, second, third = found["mistakes"]
    assert (first["place"], first["label"], first["predicted"]) == ("2.png", "cat", "dog")
    assert first["probability"] == pytest.approx(1 / (1 + np.exp(-5.0)))
    assert (second["position"], second["label"]) == (0, "dog")
    assert third["position"] == 1
    assert found["confusion"] == [[1, 2], [1, 0]]
    prediction = SimpleNamespace(predictions=logits, label_ids=np.array([1, 0, 0, 0]))
    assert accuracy(prediction) == {"accuracy": 1 / 4}
    assert compare(logits, np.array([0, 1, 1, 0]), images)["mistakes"] == []


def test_most_frequent_confusions_come_first():
    text = describe(["a", "b", "c"], [[5, 1, 0], [3, 4, 0], [0, 2, 9]])
    assert "|\n| b | a | 3 |\n| c | b | 2 |\n| a | b | 1 |\n\n" in text
    assert "No held-out image was misclassified." in describe(["a", "b"], [[2, 0], [0, 3]])
