"""Whole runs on tiny models, what they leave behind, who can load it, and how they are resumed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from pacatune.data.images import prepare_images
from pacatune.methods import CLASSIFIER_METHODS, METHODS
from pacatune.training import train
from pacatune.training.image import load_result
from pacatune.training.image.model import ImageBase, find_batch_norms
from pacatune.training.image.task import ImageTask
from tests.adapters.fixtures import edit_tensors
from tests.image_models import CLASSES, save_timm, save_vit
from tests.training.runs import (
    CHECKPOINTING,
    QUIET,
    make_trainer,
    read_json,
    refused,
)
from tests.training.test_recipe import RESULT_NAMES

PICTURES = {"confusion.png", "preprocessor_config.json"}


def accuracy_of(folder, images):
    """Accuracy of a saved result on a folder of images, one image at a time."""
    classifier = load_result(folder)
    files = sorted(images.glob("*/*.png"))
    found = [next(iter(classifier.classify(path))) for path in files]
    return np.mean([name == path.parent.name for name, path in zip(found, files, strict=True)])


def load_base(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@torch.no_grad()
def logits_of(model, pixels):
    return model(pixel_values=pixels).logits


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of PEFT's SHiRA
@pytest.mark.parametrize("method", CLASSIFIER_METHODS)
def test_run(make_config, images_dir, vit_dir, tmp_path, method):
    config = make_config(method, training={"max_steps": 14, "save_steps": 7, "eval_steps": 7})
    report, folder = train(config, console=QUIET), tmp_path / "out"
    names = {path.name for path in folder.iterdir()}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "pacatune.json"}
    weights = adapter if METHODS[method].has_adapter else {"config.json", "model.safetensors"}
    assert names >= RESULT_NAMES | PICTURES | weights
    more = report.more
    assert read_json(folder / "report.json").items() >= json.loads(json.dumps(more)).items()
    assert (more["head"], more["classes"]) == ("new", CLASSES)
    assert (report.num_steps, report.num_train_examples) == (14, 36)
    assert np.array(more["confusion"]).sum() == report.num_eval_examples == 18
    assert np.trace(more["confusion"]) / 18 == pytest.approx(more["accuracy_after"])
    assert more["accuracy_after"] == accuracy_of(folder, images_dir / "test")
    assert report.eval_loss_after < report.eval_loss_before
    assert [step for step, _ in more["eval_accuracies"]] == [0, 7, 14]
    if method != "head":
        assert more["accuracy_after"] > 0.8 > more["accuracy_before"]
    pixels = torch.randn(2, 3, 32, 32)
    ours = load_result(folder).model
    before = logits_of(ours, pixels)
    if method == "full":  # transformers alone loads it
        classify = pipeline("image-classification", model=str(folder), device="cpu")
        path = images_dir / "test" / "red" / "00.png"
        theirs = {entry["label"]: entry["score"] for entry in classify(str(path))}
        assert theirs == pytest.approx(load_result(folder).classify(path), abs=2e-2)
    if method != "paca":
        return

    load = AutoModelForImageClassification.from_pretrained
    base = load(vit_dir, num_labels=3, ignore_mismatched_sizes=True)
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, folder).eval(), pixels), before)
    assert torch.allclose(logits_of(ours.merge_and_unload(), pixels), before, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "train_batch_norm"),
    [("paca", False), ("paca", True), ("lora", False), ("full", False), ("full", True)],
)
def test_run_of_a_cnn(make_cnn, images_dir, timm_dir, tmp_path, method, train_batch_norm):
    """BatchNorm stays as it was pretrained, or its statistics are saved with the result."""
    config = make_cnn(method, training={"train_batch_norm": train_batch_norm})
    report, folder = train(config, console=QUIET), tmp_path / "out"
    assert report.more["accuracy_after"] == accuracy_of(folder, images_dir / "test")
    assert report.more["image_size"] == 32
    assert train_batch_norm or report.eval_loss_after < report.eval_loss_before
    stored = load_file(timm_dir / "model.safetensors")
    model, pixels = load_result(folder).model, torch.randn(2, 3, 32, 32)
    layers = find_batch_norms(model)
    trained = {n for n in layers if method == "full" or "modules_to_save" in n}
    assert trained or not train_batch_norm
    for name, layer in layers.items():
        plain = name.partition("timm_model.")[2].replace(".modules_to_save.default", "")
        plain = plain.replace(".original_module", "")
        moved = train_batch_norm and name in trained
        assert torch.equal(layer.running_mean, stored[f"{plain}.running_mean"]) != moved
        steps = layer.num_batches_tracked - stored[f"{plain}.num_batches_tracked"]
        assert steps == 8 * moved
        if method != "full":  # scale and shift are the pretrained ones
            assert torch.equal(layer.weight, stored[f"{plain}.weight"])
    if method != "full":
        features = model.base_model.model.timm_model.forward_features
        with torch.no_grad(), model.disable_adapter():
            expected = load_base(timm_dir).forward_features(pixels)
            assert torch.allclose(features(pixels), expected, atol=1e-6)
        return
    # A timm folder, without transformers and without us.
    loaded = load_base(folder)
    with torch.no_grad():
        assert torch.allclose(loaded(pixels), logits_of(model, pixels), atol=1e-6)
    assert tuple(loaded.pretrained_cfg["input_size"]) == (3, 32, 32)
    assert loaded.pretrained_cfg["label_names"] == CLASSES


def test_same_losses_as_plain_transformers(make_config, images_dir, tmp_path):
    """The recipe adds nothing to what Trainer and the model's own loss compute."""
    settings = {"max_steps": 7, "per_device_train_batch_size": 6, "logging_steps": 1}
    settings |= {"gradient_accumulation_steps": 2, "warmup_steps": 0, "learning_rate": 1e-3}
    settings["lr_scheduler_type"] = "linear"
    data = {"path": str(images_dir / "train"), "eval_fraction": 0}
    # A head that learns as the rest, which plain Trainer has.
    config = make_config("full", data=data, training=settings | {"head_learning_rate": 1e-3})
    report = train(config, console=QUIET)
    arguments = TrainingArguments(
        str(tmp_path / "plain"),
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **settings,
    )
    images = ImageTask(config).prepare().train
    set_seed(42)
    model = ImageBase(config.model.path, None, CLASSES, None).load(torch.float32)
    trainer = Trainer(model=model, args=arguments, train_dataset=images)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [loss for _, loss in report.train_losses] == pytest.approx(theirs, rel=1e-5)
    # Nothing is held out.
    assert (report.more["accuracy_after"], report.more["confusion"]) == (None, [])
    assert "Nothing was held out" in (tmp_path / "out" / "report.md").read_text()


def test_accumulated_batches_count_each_image_once(make_config, tmp_path):
    """Also where the last micro-batch is smaller; without dropout."""
    model, losses = save_vit(tmp_path / "model", hidden_dropout_prob=0.0), []
    for size, accumulated in ((18, 1), (5, 4)):
        training = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        options = {"data": {"train_per_class": 6}, "training": {"max_steps": 2, **training}}
        config = make_config(model={"path": str(model)}, **options)
        losses.append(dict(train(config, overwrite=True, console=QUIET).train_losses))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_augmented_images_are_evaluated_plainly(make_config):
    plain = train(make_config(training={"max_steps": 2}), console=QUIET)
    smooth = {"mixup_alpha": 1.0, "label_smoothing_factor": 0.3}
    for data, training in (({}, smooth), ({"augmentation": "crop"}, {})):
        config = make_config(data=data, training={"max_steps": 2, **training})
        report = train(config, overwrite=True, console=QUIET)
        assert report.eval_loss_before == plain.eval_loss_before
        assert report.train_losses != plain.train_losses
    # In each pass they are augmented anew.
    two_passes = {"num_train_epochs": 2, "max_steps": -1}
    trainer = make_trainer(make_config(data={"augmentation": "crop"}, training=two_passes))
    trainer.train()
    assert trainer.train_dataset.epoch == 1


def test_what_keeps_less_changes_no_loss(make_cnn):
    plain, less, lean = (
        train(make_cnn(lean=lean, training=training), overwrite=True, console=QUIET)
        for lean, training in (
            ("off", {"max_steps": 3}),
            ("off", {"max_steps": 3, CHECKPOINTING: True}),
            ("require", {"max_steps": 3}),
        )
    )
    assert dict(less.train_losses) == pytest.approx(dict(plain.train_losses), rel=1e-4)
    assert less.saved_activation_bytes < plain.saved_activation_bytes
    assert lean.train_losses == plain.train_losses
    assert lean.saved_activation_bytes < 0.8 * plain.saved_activation_bytes
    assert len(lean.lean["made"]["batch_norm"]) > 5


def test_bfloat16_weights_and_columns_from_the_images(make_config, tmp_path):
    section = {"r": 4, "selection": "gradient", "selection_batches": 2}
    report = train(make_config(model={"dtype": "bfloat16"}, paca=section), console=QUIET)
    assert report.dtype == "bfloat16"
    assert report.eval_loss_after < report.eval_loss_before
    assert report.columns == "gradient, num_batches 2"


def test_pictures_and_card(make_config, images_dir, tmp_path, capsys, drawn):
    """Mistakes are drawn where there are any: here a model that was hardly trained."""
    report = train(make_config("head", training={"max_steps": 1}), console=QUIET)
    mistakes, folder = report.more["mistakes"], tmp_path / "out"
    assert mistakes
    for mistake in mistakes:
        assert Path(mistake["place"]).parent.name == mistake["label"] != mistake["predicted"]
    with Image.open(folder / "mistakes.png") as image:
        # Noisy pictures of one colour fill a good part of it.
        coloured = np.ptp(np.asarray(image.convert("RGB")).astype(int), axis=2) > 40
        assert coloured.mean() > 0.05 * len(mistakes) / 5
    assert "![Misclassified images](mistakes.png)" in (folder / "report.md").read_text()
    prepared = prepare_images(make_config().data)
    place = prepared.evaluation[mistakes[0]["position"]]["place"]
    assert place.endswith(f"/{mistakes[0]['place']}")  # from the data's folder on
    text = (folder / "README.md").read_text()
    assert "pipeline_tag: image-classification" in text
    code = text.split("```python\n")[1].split("```")[0].replace("FOLDER", str(folder))
    exec(code.replace("IMAGE.png", str(images_dir / "test" / "red" / "00.png")), {})
    assert "'red': 0." in capsys.readouterr().out


@pytest.mark.parametrize("method", ["paca", "full"])
def test_another_size_of_image_is_restored(make_config, images_dir, tmp_path, method):
    report = train(make_config(method, data={"image_size": 48}), console=QUIET)
    assert report.more["image_size"] == 48
    # The model itself takes them.
    assert logits_of(load_result(tmp_path / "out").model, torch.randn(1, 3, 48, 48)).shape == (1, 3)
    assert report.more["accuracy_after"] == accuracy_of(tmp_path / "out", images_dir / "test")


def test_base_that_has_moved(make_config, vit_dir, tmp_path):
    model = {"path": str(shutil.copytree(vit_dir, tmp_path / "base"))}
    train(make_config(model=model, training={"max_steps": 1}), console=QUIET)
    moved, out = shutil.move(tmp_path / "base", tmp_path / "moved"), tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"base does not exist; check `model.path`"):
        load_result(out)
    assert load_result(out, base=str(moved)).classes == CLASSES
    edit_tensors(moved / "model.safetensors", lambda one: [w.add_(0.1) for w in one.values()])
    with pytest.raises(ValueError, match=r"out: the weights of \d+ of \d+ adapted modules are not"):
        load_result(out, base=str(moved))
    with pytest.raises(FileNotFoundError, match=r"has no preprocessor_config\.json; is it the rig"):
        load_result(tmp_path)


def test_what_fails(make_config, tmp_path, monkeypatch):
    save_timm(tmp_path / "model", "test_vit")
    with monkeypatch.context() as patch:
        patch.setattr(ImageBase, "load", lambda *_: pytest.fail("weights were loaded"))
        config = make_config(model={"path": str(tmp_path / "model")}, data={"image_size": 50})
        refused(r"`data.image_size` \(50\) does not suit the model", config)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "workers", "step"), [("paca", 2, 8), ("full", 0, 5), ("full", 0, 6), ("head", 0, 7)]
)
def test_signal_and_resume(make_config, assert_resumes, method, workers, step):
    """Random numbers in every step: dropout, mixup, crops."""
    training = {"mixup_alpha": 0.5, "num_train_epochs": 2, "max_steps": -1}
    training["dataloader_num_workers"] = workers
    data = {"augmentation": "crop"}
    said = assert_resumes(step, make_config, method, data=data, training=training)
    assert said.startswith(f"stopped at step {step} of 12; continue with `pacatune train-image ")


@pytest.mark.parametrize("method", ["paca", "full"])
def test_resume_with_trained_batch_norm(make_cnn, assert_resumes, method):
    assert_resumes(5, make_cnn, method, training={"train_batch_norm": True})
