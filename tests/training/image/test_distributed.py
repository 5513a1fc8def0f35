"""Two processes on CPUs (gloo) give the losses, the accuracy and the adapter of one."""

import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from pacatune.training import train
from tests.image_models import save_vit
from tests.training.launching import launch, save_config


@pytest.mark.slow
def test_two_processes_equal_one(make_config, tmp_path):
    save_vit(tmp_path / "model", hidden_dropout_prob=0.0)

    def config(name, batch_size):
        training = {"output_dir": str(tmp_path / name), "per_device_train_batch_size": batch_size}
        data = {"augmentation": "crop"}
        return make_config(model={"path": str(tmp_path / "model")}, data=data, training=training)

    train(config("one", 6), console=Console(quiet=True))
    save_config(config("two", 3), tmp_path / "run.yaml")
    launch("train-image", "--config", tmp_path / "run.yaml")
    one, two = (
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")
    )
    for key in ("train_losses", "eval_losses"):
        for first, second in zip(one[key], two[key], strict=True):
            assert first == pytest.approx(second, rel=1e-4)
    for key in ("accuracy_before", "accuracy_after", "confusion", "num_eval_examples"):
        assert one[key] == two[key], key
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")
    )
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-5)
