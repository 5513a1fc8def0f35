"""`pacatune demo-vision` as a user runs it, on a tiny model and images of one's own."""

import json
import re
import shlex
from pathlib import Path

import pytest

from pacatune.cli import main
from tests.image_models import save_timm, save_vit, write_images


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo inputs")
    write_images(folder / "images", 10)
    given = ["--model", str(save_vit(folder / "vit")), "--model", str(save_timm(folder / "cnn"))]
    images = ["--data", str(folder / "images"), "--image-size", "32"]
    return ["demo-vision", *given, *images, "--steps", "3"]


def test_result_has_three_runs_of_each_model(finished):
    folder, lines = finished
    result = json.loads((folder / "demo.json").read_text())
    assert result["finished"]
    assert len(result["models"]) == 2
    for reports in result["models"].values():
        head, lora, paca = (reports[method] for method in ("head", "lora", "paca"))
        for key in ("accuracy_before", "eval_loss_before", "num_steps", "seed", "image_size"):
            assert head[key] == lora[key] == paca[key], key
        numbers = lora["num_trainable_parameters"], paca["num_trainable_parameters"]
        assert max(numbers) < 1.5 * min(numbers)
        assert head["saved_activation_bytes"] < paca["saved_activation_bytes"]
        assert paca["saved_activation_bytes"] < lora["saved_activation_bytes"]
    table = "\n".join(lines)
    assert "head only" in table
    assert "PaCA, r=8" in table
    assert f"{paca['accuracy_after']:.3f}" in table
    assert "CIFAR-10" not in table  # only true of the demo's own images


def test_printed_command_works(finished, capsys, monkeypatch):
    folder, lines = finished
    (command,) = [shlex.split(line) for line in lines if re.match(r"  \S*pacatune", line)]
    words = command[command.index("train-image") :]
    words[words.index("--training.max_steps") + 1] = "1"
    assert main(words) == 0
    assert (folder / "longer" / "report.json").is_file()


def test_second_demo_replaces_the_first(finished, words):
    folder, _ = finished
    before = json.loads((folder / "demo.json").read_text())
    assert main([*words[:3], *words[5:], "--seed", "1", "--output", str(folder)]) == 0
    after = json.loads((folder / "demo.json").read_text())
    assert list(after["models"]) == list(before["models"])[:1]
    assert next(iter(after["models"].values()))["paca"]["seed"] == 1


def test_missing_images_are_named(tmp_path, words, capsys):
    given = [*words, "--data", str(tmp_path / "nothing"), "--output", str(tmp_path / "out")]
    assert main(given) == 2
    assert "nothing does not exist" in capsys.readouterr().err


def test_real_models_are_known_by_name():
    from pacatune.experiments.demo import IMAGE_MODELS

    for name, model in IMAGE_MODELS.items():
        assert model.learning_rates.keys() == {"head", "lora", "paca"}
        assert Path(name).name == name
