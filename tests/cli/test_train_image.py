import json
import sys

import pytest
import yaml

from pacatune.cli import main
from pacatune.cli.train_image import all_options
from tests.image_models import save_vit, write_images


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Least words of a run that works, but for the output folder."""
    folder = tmp_path_factory.mktemp("inputs")
    save_vit(folder / "model")
    write_images(folder / "images", 6)
    return [
        "train-image",
        *("--model.path", str(folder / "model")),
        *("--data.path", str(folder / "images")),
        *("--training.max_steps", "2"),
        *("--training.use_cpu", "true"),
    ]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(capsys, words):
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("pacatune: error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1].removeprefix("pacatune: error: ")


def test_run_from_words_alone(words, folder, capsys):
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "adapter, report and model card are in pacatune-run" in captured.out
    assert "MISMATCH" not in captured.err  # of the new head, which is meant
    config = json.loads((folder / "pacatune-run" / "adapter_config.json").read_text())
    assert config["peft_type"] == "PACA"
    assert config["modules_to_save"] == ["classifier"]


def test_words_override_the_config_file(words, folder):
    (folder / "run.yaml").write_text("method: lora\nlora: {r: 2}\ntraining: {max_steps: 5}\n")
    assert main([*words, "--config", "run.yaml", "--data.augmentation", "flip"]) == 0
    values = yaml.safe_load((folder / "pacatune-run" / "config.yaml").read_text())
    assert values["method"] == "lora"
    assert values["lora"]["r"] == 2
    assert values["data"]["augmentation"] == "flip"
    assert values["training"]["max_steps"] == 5  # the file came later


def test_preset_comes_first(words, capsys):
    show = ["train-image", "--preset", "vit-b16-pets", "--data.image_size", "96", "--print_config"]
    assert main(show) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert values["model"]["path"] == "google/vit-base-patch16-224-in21k"
    assert values["data"]["path"] == "torchvision:OxfordIIITPet"
    assert values["data"]["image_size"] == 96
    assert values["training"]["per_device_train_batch_size"] == 64
    # Nothing of it is left for the next command of this process.
    assert main(["train-image", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["path"] == ""


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--preset", "vit"], "`preset` ('vit') must be one of vit-b16-cifar10"),
        (["--method", "qlora"], "method"),
        (
            ["--data.path", "nowhere/x/y"],
            "nowhere/x/y does not exist; check `data.path`",
        ),
        (["--model.path", ""], "`model.path` is ''; give a hub id"),
        (
            ["--data.imag_size", "3"],
            "unknown option --data.imag_size; did you mean '--data.image_si",
        ),
        (["--data.augmentation", "rotate"], "data.augmentation"),
        (["--preview", "2"], "unknown option --preview"),
        (["--resume"], "holds no run to resume"),
    ],
)
def test_user_errors_are_one_line(words, folder, capsys, extra, message):
    assert message in error_of(capsys, [*words, *extra])
    assert not (folder / "pacatune-run").exists()


def test_missing_packages_are_named(words, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert error_of(capsys, words) == (
        "`pacatune train-image` needs packages that are not installed (timm): "
        "pip install 'pacatune[vision]'"
    )


def test_template_explains_every_key_and_is_a_config(words, folder, capsys):
    assert main(["train-image", "--print_config"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    for line, before in zip(lines[1:], lines, strict=False):
        if line.startswith("  ") and not line.lstrip().startswith("#"):
            assert before.lstrip().startswith("#"), line
    (folder / "template.yaml").write_text(text)
    assert main([words[0], "--config", "template.yaml", *words[1:]]) == 0


def test_every_option_has_help():
    for action in all_options().parser._actions:
        assert action.help, action.dest
