"""Whole runs on tiny models."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pacatune.data.images import prepare_images
from pacatune.methods import CLASSIFIER_METHODS, METHODS
from pacatune.training import PacaSection, train
from pacatune.training.image import load_result
from pacatune.training.image.model import ImageBase
from pacatune.training.image.task import ImageTask, ImageTrainer
from tests.image_models import CLASSES, save_timm, save_vit
from tests.training.test_recipe import REPORT_KEYS

RESULT_NAMES = {
    "config.yaml",
    "report.json",
    "report.md",
    "loss.png",
    "confusion.png",
    "README.md",
    "preprocessor_config.json",
}


def accuracy_of(folder, images):
    """Accuracy of a saved result on a folder of images, one image at a time."""
    classifier = load_result(folder)
    files = sorted(images.glob("*/*.png"))
    found = [next(iter(classifier.classify(path))) for path in files]
    return np.mean([name == path.parent.name for name, path in zip(found, files, strict=True)])


@pytest.mark.parametrize("method", CLASSIFIER_METHODS)
def test_run(make_config, images_dir, tmp_path, console, method):
    config = make_config(method, training={"max_steps": 14, "save_steps": 7, "eval_steps": 7})
    report = train(config, console=console)
    folder = tmp_path / "out"
    names = {path.name for path in folder.iterdir()}
    weights = {"adapter_config.json", "adapter_model.safetensors", "pacatune.json"}
    is_adapter = METHODS[method].has_adapter
    assert names >= RESULT_NAMES | (weights if is_adapter else {"config.json", "model.safetensors"})
    assert is_adapter == ("adapter_config.json" in names)
    assert not any("training_args" in name or ".pacatune/incomplete" in name for name in names)

    saved = json.loads((folder / "report.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert saved.keys() >= REPORT_KEYS - {"tokens_per_second"} | {"images_per_second"}
    assert saved["accuracy_before"] is not None
    assert report.more["head"] == "new"
    assert report.more["classes"] == CLASSES
    assert report.num_steps == 14
    assert report.num_train_examples == 36
    assert np.array(report.more["confusion"]).sum() == report.num_eval_examples == 18
    assert np.trace(report.more["confusion"]) / 18 == pytest.approx(report.more["accuracy_after"])
    assert report.more["accuracy_after"] == accuracy_of(folder, images_dir / "test")
    assert report.eval_loss_after < report.eval_loss_before
    assert [step for step, _ in report.more["eval_accuracies"]] == [0, 7, 14]
    assert report.saved_activation_bytes > 0
    assert report.more["images_per_second"] > 0
    if method != "head":
        assert report.more["accuracy_after"] > 0.8 > report.more["accuracy_before"]


@pytest.mark.parametrize("method", ["paca", "lora", "full"])
def test_run_of_a_cnn(make_config, images_dir, timm_dir, tmp_path, console, cnn, method):
    config = make_config(method, **cnn)
    report = train(config, console=console)
    assert report.more["accuracy_after"] == accuracy_of(tmp_path / "out", images_dir / "test")
    assert report.more["image_size"] == 32
    assert report.eval_loss_after < report.eval_loss_before
    if method == "lora":
        assert "conv_dw, 1 x conv_stem left as it is" in console.file.getvalue()
        assert any("or grouped (depthwise)" in warning for warning in report.warnings)
    # BatchNorm stays as it was pretrained, its statistics in any case.
    stored = load_file(timm_dir / "model.safetensors")
    model = load_result(tmp_path / "out").model
    kept = {key.partition("timm_model.")[2]: value for key, value in model.state_dict().items()}
    for name, tensor in stored.items():
        if "running" in name:
            assert torch.equal(kept[name], tensor), name


def test_same_losses_as_plain_transformers(make_config, images_dir, tmp_path, console):
    """The recipe adds nothing to what Trainer and the model's own loss compute."""
    from transformers import Trainer, TrainingArguments, set_seed

    settings = {
        "learning_rate": 1e-3,
        "max_steps": 7,
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
    }
    data = {"path": str(images_dir / "train"), "eval_fraction": 0}
    config = make_config("full", data=data, training=settings)
    report = train(config, console=console)
    base = ImageBase(config.model.path, None, CLASSES, None)
    run = ImageTask(config).prepare()
    arguments = TrainingArguments(
        str(tmp_path / "plain"),
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **settings,
    )
    set_seed(42)
    model = base.load(torch.float32)
    trainer = Trainer(model=model, args=arguments, train_dataset=run.train)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [loss for _, loss in report.train_losses] == pytest.approx(theirs, rel=1e-5)


def test_accumulated_batches_count_each_image_once(make_config, tmp_path, console):
    """Also where the last micro-batch is smaller."""
    save_vit(tmp_path / "model", hidden_dropout_prob=0.0)
    losses = []
    for options in (
        {"per_device_train_batch_size": 18},
        {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 4},
    ):
        config = make_config(
            model={"path": str(tmp_path / "model")},
            data={"train_per_class": 6},
            training={"max_steps": 2, **options},
        )
        losses.append(dict(train(config, overwrite=True, console=console).train_losses))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_mixed_and_smoothed_losses_are_evaluated_plainly(make_config, console):
    plain = train(make_config(training={"max_steps": 1}), console=console)
    options = {"max_steps": 1, "mixup_alpha": 1.0, "label_smoothing_factor": 0.3}
    mixed = train(make_config(training=options), overwrite=True, console=console)
    assert mixed.eval_loss_before == plain.eval_loss_before
    assert mixed.train_losses[0][1] != plain.train_losses[0][1]


@pytest.mark.parametrize("augmentation", ["flip", "crop"])
def test_augmented_run(make_config, console, augmentation):
    plain = train(make_config(training={"max_steps": 2}), console=console)
    config = make_config(data={"augmentation": augmentation}, training={"max_steps": 2})
    report = train(config, overwrite=True, console=console)
    assert report.train_losses != plain.train_losses
    assert report.eval_loss_before == plain.eval_loss_before


@pytest.mark.parametrize("kind", ["transformers", "timm"])
@pytest.mark.parametrize("method", ["paca", "full"])
def test_checkpointed_activations_change_no_loss(make_config, tmp_path, console, cnn, kind, method):
    options = cnn
    if kind == "transformers":
        save_vit(tmp_path / "model", hidden_dropout_prob=0.0)
        options = {"model": {"path": str(tmp_path / "model")}}
    plain = train(make_config(method, **options, training={"max_steps": 3}), console=console)
    name = "activation_checkpointing"
    name = name if hasattr(make_config().training, name) else "gradient_checkpointing"
    config = make_config(method, **options, training={"max_steps": 3, name: True})
    lean = train(config, overwrite=True, console=console)
    for (_, one), (_, two) in zip(plain.train_losses, lean.train_losses, strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    assert lean.saved_activation_bytes < plain.saved_activation_bytes


def test_bfloat16_weights(make_config, console):
    report = train(make_config(model={"dtype": "bfloat16"}), console=console)
    assert report.dtype == "bfloat16"
    assert report.eval_loss_after < report.eval_loss_before


def test_own_head_is_evaluated_before(make_config, tmp_path, console):
    """Go on with a model that knows the classes."""
    first = train(make_config("full", training={"max_steps": 14}), console=console)
    shutil.move(tmp_path / "out", tmp_path / "first")
    config = make_config(model={"path": str(tmp_path / "first")}, training={"max_steps": 1})
    second = train(config, console=console)
    assert second.more["head"] == "own"
    assert second.more["accuracy_before"] == first.more["accuracy_after"]
    assert second.eval_loss_before == pytest.approx(first.eval_loss_after, rel=1e-5)
    assert "the model's own head" in console.file.getvalue()


def test_run_without_evaluation(make_config, images_dir, tmp_path, console):
    data = {"path": str(images_dir / "train"), "eval_fraction": 0}
    report = train(make_config(data=data, training={"max_steps": 2}), console=console)
    assert report.more["accuracy_before"] is None
    assert report.more["accuracy_after"] is None
    assert report.more["confusion"] == []
    assert not (tmp_path / "out" / "confusion.png").exists()
    assert "Nothing was held out" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("method", ["paca", "full"])
def test_early_stopping_keeps_the_best(make_config, images_dir, tmp_path, console, method):
    options = {
        "learning_rate": 2.0 if method == "paca" else 0.3,
        "eval_steps": 1,
        "save_steps": 1,
        "max_steps": 20,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
    }
    config = make_config(method, training=options, early_stopping_patience=2)
    report = train(config, console=console)
    losses = dict(report.eval_losses)
    best = min((loss, step) for step, loss in losses.items() if step > 0)
    assert report.num_steps == best[1] + 2 < 20
    assert report.eval_loss_after == pytest.approx(best[0], rel=1e-5)
    assert report.more["accuracy_after"] == dict(report.more["eval_accuracies"])[best[1]]
    assert report.more["accuracy_after"] == accuracy_of(tmp_path / "out", images_dir / "test")


def test_pictures(make_config, images_dir, tmp_path, console, drawn):
    """Mistakes are drawn where there are any: here a model that was hardly trained."""
    report = train(make_config("head", training={"max_steps": 1}), console=console)
    assert report.more["mistakes"]
    probabilities = [mistake["probability"] for mistake in report.more["mistakes"]]
    assert probabilities == sorted(probabilities, reverse=True)
    for mistake in report.more["mistakes"]:
        assert Path(mistake["place"]).parent.name == mistake["label"] != mistake["predicted"]
    for name in ("confusion.png", "mistakes.png", "loss.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert min(image.size) > 200
            if name == "mistakes.png":  # noisy pictures of one colour fill a good part of it
                coloured = np.ptp(np.asarray(image.convert("RGB")).astype(int), axis=2) > 40
                assert coloured.mean() > 0.05 * len(report.more["mistakes"]) / 5
    text = (tmp_path / "out" / "report.md").read_text()
    assert "![Misclassified images](mistakes.png)" in text
    assert "| class | taken for | images |" in text
    prepared = prepare_images(make_config().data)
    first = report.more["mistakes"][0]
    assert prepared.evaluation[first["position"]]["place"] == first["place"]


def test_columns_are_chosen_from_the_images(make_config, console):
    from pacatune.selection import load_columns

    section = PacaSection(r=4, selection="gradient", selection_batches=2, normalize="input")
    config = make_config(paca=section, training={"max_steps": 2})
    report = train(config, console=console)
    assert report.columns == "gradient, num_batches 2, normalize input"
    folder = Path(config.training.output_dir)
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert saved["columns"] == load_columns(folder)
    assert saved["column_rates"].keys() == saved["columns"].keys()


def test_lean_batch_norm_keeps_less_and_changes_no_loss(make_config, cnn, tmp_path):
    reports = []
    for mode in ("off", "require"):
        training = {"output_dir": str(tmp_path / mode), "max_steps": 2}
        reports.append(train(make_config(lean=mode, training=training, **cnn)))
    plain, lean = reports
    assert plain.train_losses == lean.train_losses
    assert lean.saved_activation_bytes < 0.8 * plain.saved_activation_bytes
    assert len(lean.lean["made"]["batch_norm"]) > 5


def test_plan_is_shown_before_training(make_config, console):
    train(make_config(training={"max_steps": 1}), console=console)
    out = console.file.getvalue()
    assert "data: 36 images of 3 classes, 18 held out; 32 x 32 pixels, a new head" in out
    assert "training 7,267 of 24,003 parameters (paca): 2 x q_proj (32 -> 32)" in out
    assert out.index("data: 36 images") < out.index("step 0/1: evaluation loss")
    assert ", accuracy 0." in out
    assert "(always the largest class: 0.3333)" in out


class TestBeforeWeights:
    """What is refused, is refused before any weight is loaded and anything is written."""

    @pytest.fixture(autouse=True)
    def no_weights(self, monkeypatch, tmp_path):
        def refuse(*args):
            raise AssertionError("weights were loaded")

        monkeypatch.setattr(ImageBase, "load", refuse)
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
            train(make_config(paca=PacaSection(target_modules=["fc1", "no_such"])))


def test_out_of_memory_says_what_to_lower(make_config, console, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(ImageTrainer, "training_step", out_of_memory)
    with pytest.raises(ValueError, match=r"ran out of memory .*or `data.image_size`, or set"):
        train(make_config(), console=console)
