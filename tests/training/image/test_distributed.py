"""Two processes on CPUs (gloo) give the losses, the accuracy and the adapter of one."""

import pytest

from pacatune.training import train
from tests.image_models import save_vit
from tests.training.launching import launch, save_config
from tests.training.runs import QUIET, assert_close, read_json


@pytest.mark.slow
def test_two_processes_equal_one(make_config, tmp_path):
    save_vit(tmp_path / "model", hidden_dropout_prob=0.0)

    def config(name, batch_size):
        training = {"output_dir": str(tmp_path / name), "per_device_train_batch_size": batch_size}
        data = {"augmentation": "crop"}
        return make_config(model={"path": str(tmp_path / "model")}, data=data, training=training)

    train(config("one", 6), console=QUIET)
    save_config(config("two", 3), tmp_path / "run.yaml")
    launch("train-image", "--config", tmp_path / "run.yaml")
    one, two = (read_json(tmp_path / name, "report.json") for name in ("one", "two"))
    for key in ("train_losses", "eval_losses"):
        assert dict(one[key]) == pytest.approx(dict(two[key]), rel=1e-4)
    for key in ("accuracy_before", "accuracy_after", "confusion", "num_eval_examples"):
        assert one[key] == two[key], key
    assert_close(tmp_path / "one", tmp_path / "two", rtol=1e-3, atol=1e-5)
