"""What a model says about itself, and what is refused, before any weight is read."""

import json
import shutil

import pytest

from pacatune.training.image.model import describe_base
from tests.image_models import save_timm

CLASSES = ["blue", "green", "red"]


def describe(path, image_size=None, classes=CLASSES):
    return describe_base(str(path), None, classes, image_size)


def test_transformers_model(vit_dir):
    base = describe(vit_dir)
    assert base.path == str(vit_dir)
    assert base.preprocessing.size == 32
    assert base.preprocessing.squash
    assert base.config.num_labels == 3
    assert base.config.label2id == {"blue": 0, "green": 1, "red": 2}
    assert not base.has_own_head
    assert base.warnings == []
    assert base.empty_model().classifier.out_features == 3


def test_timm_model_as_timm_writes_it(timm_dir):
    base = describe(timm_dir, image_size=64)
    assert base.preprocessing.size == 64
    assert base.preprocessing.resize == 67  # 168 of 160: what timm crops away
    assert base.config.pretrained_cfg["input_size"] == (3, 64, 64)
    assert base.empty_model().timm_model.get_classifier().out_features == 3


def test_head_of_the_same_classes_is_kept(vit_dir, tmp_path):
    shutil.copytree(vit_dir, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    labels = {"id2label": {"0": "blue", "1": "green"}, "label2id": {"blue": 0, "green": 1}}
    path.write_text(json.dumps(json.loads(path.read_text()) | labels))
    assert describe(path.parent, classes=["blue", "green"]).has_own_head
    assert not describe(path.parent, classes=["green", "blue"]).has_own_head
    assert describe(path.parent, classes=None).config.id2label == {0: "blue", 1: "green"}


def test_other_sizes_of_image(vit_dir):
    base = describe(vit_dir, image_size=64)
    assert base.forward_options == {"interpolate_pos_encoding": True}
    assert describe(vit_dir, image_size=32).forward_options == {}


def test_size_that_the_model_cannot_take(tmp_path):
    save_timm(tmp_path, "test_vit")
    with pytest.raises(
        ValueError, match=r"`data.image_size` \(50\) does not suit the model: .*Use"
    ):
        describe(tmp_path, image_size=50)


def test_other_sizes_of_a_timm_transformer(tmp_path):
    description = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 1000,
        "model_args": {"depth": 1, "num_classes": 1000},
    }
    (tmp_path / "config.json").write_text(
        json.dumps({**description, "pretrained_cfg": {"input_size": [3, 224, 224]}})
    )
    base = describe(tmp_path, image_size=64)
    assert base.config.model_args == {"depth": 1, "dynamic_img_size": True}
    assert base.forward_options == {}
    assert describe(tmp_path).config.model_args == {"depth": 1}


def test_model_that_does_not_say_how_images_are_prepared(vit_dir, tmp_path):
    shutil.copytree(vit_dir, tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    base = describe(tmp_path / "model")
    assert base.preprocessing.size == 32
    assert base.warnings[0].endswith(
        "does not say how images are prepared: 32 pixels, ImageNet's mean."
    )


def test_language_model(tiny_model_dir):
    with pytest.raises(ValueError, match="a 'llama' model is no image classifier; use one that is"):
        describe(tiny_model_dir, classes=CLASSES).empty_model()


def test_model_for_other_images(vit_dir, tmp_path):
    shutil.copytree(vit_dir, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_channels": 5}))
    with pytest.raises(ValueError, match="takes images of 5 channels; they have 3 here"):
        describe(tmp_path / "model")


@pytest.mark.parametrize("path", ["owner/model", "timm/resnet18.a1_in1k", "resnet18.a1_in1k"])
def test_hub_model_without_a_network(path):
    with pytest.raises(
        FileNotFoundError, match=r"is neither a file or folder here nor a model of the hub"
    ):
        describe(path)


def test_bare_name_of_timm_is_its_hub_id():
    with pytest.raises(FileNotFoundError, match=r"'timm/resnet18\.a1_in1k'\) is neither"):
        describe("resnet18")


def test_timm_weights_that_do_not_exist():
    with pytest.raises(FileNotFoundError, match=r"'resnet18.nope'.*timm.list_pretrained"):
        describe("resnet18.nope")


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist; check `model\.path`"):
        describe(tmp_path / "none")
    with pytest.raises(
        FileNotFoundError, match=r"holds no config.json; `model.path` must be a mod"
    ):
        describe(tmp_path)
