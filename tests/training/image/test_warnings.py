"""What is said before and instead of training."""

import shutil

import pytest
import torch

from pacatune.training.image import PacaSection, train
from pacatune.training.image import task as task_module
from tests.image_models import save_timm


def test_plan_is_shown_before_training(make_config, console):
    train(make_config(training={"max_steps": 1}), console=console)
    out = console.file.getvalue()
    assert "data: 36 images of 3 classes, 18 held out; 32 x 32 pixels, a new head" in out
    assert "training 7,267 of 24,003 parameters (paca): 2 x q_proj (32 -> 32)" in out
    assert out.index("data: 36 images") < out.index("step 0/1: evaluation loss")
    assert ", accuracy 0." in out
    assert "chance is 0.333" in out


class TestBeforeWeights:
    """What is refused, is refused before any weight is loaded and anything is written."""

    @pytest.fixture(autouse=True)
    def no_weights(self, monkeypatch, tmp_path):
        def refuse(*args):
            raise AssertionError("weights were loaded")

        monkeypatch.setattr(task_module, "load_model", refuse)
        yield
        assert not (tmp_path / "out").exists()

    def test_bad_image(self, make_config, images_dir, tmp_path):
        shutil.copytree(images_dir, tmp_path / "images")
        (tmp_path / "images" / "train" / "red" / "00.png").write_bytes(b"\x89PNG")
        with pytest.raises(ValueError, match=r"1 of 54 images cannot be used: .*red/00\.png"):
            train(make_config(data={"path": str(tmp_path / "images")}))

    def test_size_that_does_not_suit(self, make_config, tmp_path):
        save_timm(tmp_path / "model", "test_vit")
        with pytest.raises(ValueError, match=r"`data.image_size` \(50\) does not suit the model"):
            train(make_config(model={"path": str(tmp_path / "model")}, data={"image_size": 50}))

    def test_targets(self, make_config):
        with pytest.raises(ValueError, match="no_such"):
            train(make_config(paca=PacaSection(target_modules=["no_such"])))

    def test_tracker_that_is_not_installed(self, make_config):
        with pytest.raises(ValueError, match=r"`training.report_to` \('wandb'\) is not installed"):
            train(make_config(training={"report_to": "wandb"}))

    def test_resume_of_nothing(self, make_config):
        with pytest.raises(ValueError, match="out holds no run to resume; start it without"):
            train(make_config(), resume=True)

    def test_model_that_does_not_exist(self, make_config):
        with pytest.raises(FileNotFoundError, match="no/such"):
            train(make_config(model={"path": "./no/such"}))


def test_out_of_memory_says_what_to_lower(make_config, console, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(task_module.ImageTrainer, "training_step", out_of_memory)
    with pytest.raises(ValueError, match=r"ran out of memory .*or `data.image_size`, or set"):
        train(make_config(), console=console)
