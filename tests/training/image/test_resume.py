"""Interrupted in any way and resumed, a run ends with the very tensors of one that was not."""

import io
import json
import shutil
import signal

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from pacatune.training import TrainingInterrupted, train
from pacatune.training.image.task import ImageTrainer

# Random numbers in every step: dropout, mixup, crops.
RANDOM = {"mixup_alpha": 0.5, "num_train_epochs": 2, "max_steps": -1, "save_total_limit": 20}


@pytest.fixture
def quiet():
    return Console(file=io.StringIO(), width=200)


def random_config(make_config, tmp_path, name, method="paca", **training):
    training = {**RANDOM, "output_dir": str(tmp_path / name), **training}
    return make_config(method, data={"augmentation": "crop"}, training=training)


def assert_same_run(first, second):
    files = [path.name for path in first.glob("*.safetensors")]
    assert len(files) == 1
    for name in (*files, f"checkpoint-12/{files[0]}"):
        one, two = load_file(first / name), load_file(second / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (first, second)]
    for key in (
        "accuracy_before",
        "accuracy_after",
        "eval_loss_after",
        "train_losses",
        "eval_losses",
        "eval_accuracies",
        "confusion",
    ):
        assert reports[0][key] == reports[1][key], key


def stop_at(monkeypatch, step, action):
    """Do something inside a training step of the trainer."""
    plain = ImageTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            action()
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(ImageTrainer, "training_step", training_step)


def interrupt(config, monkeypatch, step=5):
    with monkeypatch.context() as patch:
        stop_at(patch, step, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(TrainingInterrupted) as caught:
            train(config, console=Console(quiet=True))
    return str(caught.value)


@pytest.mark.parametrize(
    ("method", "workers", "step"),
    [("paca", 0, 5), ("paca", 2, 8), ("full", 0, 5), ("full", 0, 6), ("head", 0, 7)],
)
def test_signal_and_resume(make_config, tmp_path, quiet, monkeypatch, method, workers, step):
    options = {"method": method, "dataloader_num_workers": workers}
    train(random_config(make_config, tmp_path, "whole", **options), console=quiet)
    config = random_config(make_config, tmp_path, "cut", **options)
    message = interrupt(config, monkeypatch, step)
    assert message.startswith(f"stopped at step {step} of 12; continue with `pacatune train-image ")
    assert message.endswith("cut/config.yaml --resume`")
    train(config, resume=True, console=quiet)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("method", ["paca", "full"])
def test_resume_with_trained_batch_norm(make_config, tmp_path, quiet, monkeypatch, cnn, method):
    training = {"train_batch_norm": True, "max_steps": 12, "save_total_limit": 20}

    def config(name):
        options = {**training, "output_dir": str(tmp_path / name)}
        return make_config(method, **cnn, training=options)

    train(config("whole"), console=quiet)
    interrupt(config("cut"), monkeypatch)
    resumed = train(config("cut"), resume=True, console=quiet)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    whole = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert resumed.num_trainable_parameters == whole["num_trainable_parameters"]


def test_resume_refuses_changed_images(make_config, images_dir, tmp_path, monkeypatch):
    shutil.copytree(images_dir, tmp_path / "images")
    config = make_config(data={"path": str(tmp_path / "images")})
    interrupt(config, monkeypatch)
    Image.new("RGB", (40, 36)).save(tmp_path / "images" / "train" / "red" / "00.png")
    with pytest.raises(ValueError, match=r"the training data has changed since .*checkpoint-5"):
        train(config, resume=True)


def test_other_run_in_the_folder(make_config, tmp_path, quiet):
    config = make_config("head", training={"max_steps": 2})
    train(config, console=quiet)
    with pytest.raises(
        FileExistsError, match=r"out holds another run \(README.md, checkpoint-2, config.json\)"
    ):
        train(config)
    train(make_config(training={"max_steps": 2}), overwrite=True, console=quiet)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" not in names
    deleted = quiet.file.getvalue().split("deleting from ")[1]
    assert "model.safetensors" in deleted
    assert "preprocessor_config.json" in deleted
