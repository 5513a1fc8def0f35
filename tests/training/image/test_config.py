import dataclasses

import pytest
from transformers import TrainingArguments

from pacatune.methods import CLASSIFIER_METHODS, METHODS
from pacatune.training import RunConfig
from pacatune.training.config_file import read_values, to_values
from pacatune.training.image import ImageTrainingConfig
from pacatune.training.image.config import PRESETS, find_preset
from tests.training.launching import save_config


def test_has_every_option_of_transformers_and_two_more():
    ours = {field.name for field in dataclasses.fields(ImageTrainingConfig)}
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert ours - theirs == {"train_batch_norm", "mixup_alpha"}
    assert theirs <= ours


@pytest.mark.parametrize("method", CLASSIFIER_METHODS)
def test_learning_rate_is_that_of_the_method(make_config, method):
    assert make_config(method).training.learning_rate == 5e-3
    config = make_config(method, training={"learning_rate": None})
    assert config.training.learning_rate == METHODS[method].head_rate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remove_unused_columns": True}, "not offered: the data has the columns"),
        ({"resume_from_checkpoint": "x"}, "not offered: use --resume"),
        ({"label_names": ["x"]}, "not offered: the class of an image is its only label"),
        ({"prediction_loss_only": True}, "not offered: the accuracy is always measured"),
        ({"batch_eval_metrics": True}, "not offered: the accuracy is measured over all images"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImageTrainingConfig(use_cpu=True, **options)


def test_saved_values_come_back(make_config, tmp_path):
    config = make_config(training={"mixup_alpha": 0.2, "optim_args": "a=1"})
    save_config(config, tmp_path / "config.yaml")
    values = read_values(tmp_path / "config.yaml")
    assert values == to_values(config)
    assert values["training"]["mixup_alpha"] == 0.2
    assert values["training"]["train_batch_norm"] is False
    assert values["training"]["optim_args"] == "a=1"
    assert "gradient_accumulation_steps" not in values["training"]
    text = (tmp_path / "config.yaml").read_text()
    assert text.startswith("# Repeat with: pacatune train-image --config config.yaml\n")


@pytest.mark.parametrize("name", PRESETS)
def test_preset_names_options_of_a_run(name):
    given = {section: {} for section in ("model", "data", "training")}
    for option, value in find_preset(name).items():
        section, _, key = option.partition(".")
        given[section][key] = value
    config = RunConfig(task="image", **given)
    assert config.data.path.startswith("torchvision:")
    assert config.data.eval_split == "test"


def test_presets_have_the_shapes_of_the_paper():
    """ViT-B/16 and EfficientNetV2-L, built without weights from what transformers and timm know."""
    import torch
    from transformers import AutoModelForImageClassification, TimmWrapperConfig, ViTConfig

    with torch.device("meta"):
        vit = AutoModelForImageClassification.from_config(ViTConfig(num_labels=10))
        path = find_preset("efficientnetv2-l-cifar10")["model.path"]
        name = path.removeprefix("timm/").partition(".")[0]
        cnn = AutoModelForImageClassification.from_config(
            TimmWrapperConfig(architecture=name, num_labels=10)
        )
    assert round(vit.num_parameters() / 1e6) == 86
    assert round(cnn.num_parameters() / 1e6) == 117
