"""Interrupted in any way and resumed, a run ends with the very bits of one that was not."""

import shutil

import pytest
from PIL import Image

from tests.training.runs import interrupt, refused


@pytest.mark.parametrize(
    ("method", "workers", "step"),
    [("paca", 0, 5), ("paca", 2, 8), ("full", 0, 5), ("full", 0, 6), ("head", 0, 7)],
)
def test_signal_and_resume(make_config, assert_resumes, method, workers, step):
    """Random numbers in every step: dropout, mixup, crops."""
    training = {"mixup_alpha": 0.5, "num_train_epochs": 2, "max_steps": -1}
    training["dataloader_num_workers"] = workers
    data = {"augmentation": "crop"}
    said = assert_resumes(step, make_config, method, data=data, training=training)
    assert said.startswith(f"stopped at step {step} of 12; continue with `pacatune train-image ")
    assert said.endswith("cut/config.yaml --resume`")


@pytest.mark.parametrize("method", ["paca", "full"])
def test_resume_with_trained_batch_norm(make_cnn, assert_resumes, method):
    assert_resumes(5, make_cnn, method, training={"train_batch_norm": True})


def test_resume_refuses_changed_images(make_config, images_dir, tmp_path, monkeypatch):
    shutil.copytree(images_dir, tmp_path / "images")
    config = make_config(data={"path": str(tmp_path / "images")})
    interrupt(config, monkeypatch, 5)
    Image.new("RGB", (40, 36)).save(tmp_path / "images" / "train" / "red" / "00.png")
    refused(r"the training data has changed since .*checkpoint-5", config, resume=True)
