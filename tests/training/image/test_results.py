"""What a run leaves behind, and who can load it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pacatune.training import train
from pacatune.training.image import load_result
from pacatune.training.image.model import find_batch_norms
from tests.image_models import CLASSES
from tests.training.image.test_recipe import accuracy_of


@pytest.mark.parametrize("method", ["paca", "full"])
def test_trained_batch_norm_is_saved_and_restored(
    make_config, images_dir, timm_dir, tmp_path, console, cnn, method
):
    config = make_config(method, training={"train_batch_norm": True}, **cnn)
    report = train(config, console=console)
    assert report.more["accuracy_after"] == accuracy_of(tmp_path / "out", images_dir / "test")
    classifier = load_result(tmp_path / "out")
    stored = load_file(timm_dir / "model.safetensors")
    layers = find_batch_norms(classifier.model)
    trained = [n for n in layers if method == "full" or "modules_to_save" in n]
    assert trained
    for name in trained:
        plain = name.partition("timm_model.")[2].replace(".modules_to_save.default", "")
        assert not torch.equal(layers[name].running_mean, stored[f"{plain}.running_mean"])
        assert layers[name].num_batches_tracked == stored[f"{plain}.num_batches_tracked"] + 8
        if method == "paca":  # scale and shift are the pretrained ones
            assert torch.equal(layers[name].weight, stored[f"{plain}.weight"])
    if method == "paca":
        with classifier.model.disable_adapter():
            pixels = torch.randn(2, 3, 32, 32)
            without = classifier.model.base_model.model.timm_model.forward_features(pixels)
        base = load_base(timm_dir)
        assert torch.allclose(without, base.forward_features(pixels), atol=1e-6)


def load_base(folder):
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def test_another_size_of_image_is_restored(make_config, images_dir, tmp_path, console):
    for method in ("paca", "full"):
        report = train(
            make_config(method, data={"image_size": 48}), overwrite=True, console=console
        )
        assert report.more["image_size"] == 48
        classifier = load_result(tmp_path / "out")
        pixels = torch.randn(1, 3, 48, 48)
        with torch.no_grad():  # the model itself takes them
            logits = classifier.model(pixel_values=pixels).logits
        assert logits.shape == (1, 3)
        assert report.more["accuracy_after"] == accuracy_of(tmp_path / "out", images_dir / "test")


def test_timm_result_is_a_timm_folder(make_config, tmp_path, console, cnn):
    """Without transformers and without us."""
    train(make_config("full", **cnn), console=console)
    model = load_base(tmp_path / "out")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = load_result(tmp_path / "out").model(pixel_values=pixels).logits
        assert torch.allclose(model(pixels), ours, atol=1e-6)
    assert model.pretrained_cfg["input_size"] in ((3, 32, 32), [3, 32, 32])
    assert model.pretrained_cfg["label_names"] == CLASSES


def test_transformers_result_loads_without_us(make_config, images_dir, tmp_path, console):
    from transformers import pipeline

    train(make_config("full", training={"max_steps": 14}), console=console)
    classify = pipeline("image-classification", model=str(tmp_path / "out"), device="cpu")
    path = images_dir / "test" / "red" / "00.png"
    theirs = {entry["label"]: entry["score"] for entry in classify(str(path))}
    ours = load_result(tmp_path / "out").classify(path)
    assert theirs == pytest.approx(ours, abs=2e-2)


def test_merged_result(make_config, images_dir, tmp_path, console):
    train(make_config(), console=console)
    classifier = load_result(tmp_path / "out")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = classifier.model(pixel_values=pixels).logits
    merged = classifier.model.merge_and_unload()
    assert torch.allclose(merged(pixel_values=pixels).logits, before, atol=1e-5)


def test_card_and_its_code(make_config, images_dir, tmp_path, console, capsys):
    train(make_config(training={"max_steps": 1}), console=console)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in text
    assert "library_name: peft" in text
    assert "Tells apart 3 classes: blue, green, red." in text
    assert "which `pacatune train-image --config config.yaml` repeats" in text
    code = text.split("```python\n")[1].split("```")[0]
    code = code.replace("FOLDER", str(tmp_path / "out"))
    exec(code.replace("IMAGE.png", str(images_dir / "test" / "red" / "00.png")), {})
    assert "'red': 0." in capsys.readouterr().out


def test_adapter_loads_with_peft_alone(make_config, vit_dir, images_dir, tmp_path, console):
    from peft import PeftModel
    from transformers import AutoModelForImageClassification

    train(make_config(), console=console)
    base = AutoModelForImageClassification.from_pretrained(
        vit_dir, num_labels=3, ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs = model(pixel_values=pixels).logits
        ours = load_result(tmp_path / "out").model(pixel_values=pixels).logits
    assert torch.equal(theirs, ours)


def test_base_that_has_moved(make_config, vit_dir, tmp_path, console):
    shutil.copytree(vit_dir, tmp_path / "base")
    train(
        make_config(model={"path": str(tmp_path / "base")}, training={"max_steps": 1}),
        console=console,
    )
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"base does not exist; check `model.path`"):
        load_result(tmp_path / "out")
    assert load_result(tmp_path / "out", base=str(tmp_path / "moved")).classes == CLASSES
    weights = tmp_path / "moved" / "model.safetensors"
    save_file({name: w + 0.1 for name, w in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"out: the weights of \d+ of \d+ adapted modules are not"):
        load_result(tmp_path / "out", base=str(tmp_path / "moved"))


def test_folder_without_a_result(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"has no preprocessor_config\.json; is it the right folder"
    ):
        load_result(tmp_path)
