"""The examples as a user runs them, on tiny models and data of one's own."""

import contextlib
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel

from examples import images as image_example
from pacatune.cli import main
from tests.data.conftest import write_lines
from tests.image_models import save_timm, save_vit, write_images

IMAGE_METHODS = ("head", "lora", "paca")
EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *words, output):
    """Run an example; return its new folder, and what it has printed."""
    known = set(output.iterdir()) if output.is_dir() else set()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.syspath_prepend(str(EXAMPLES))
        patch.setattr(sys, "argv", [f"{name}.py", *words, "--output", str(output)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    (folder,) = set(output.iterdir()) - known
    return folder, out.getvalue()


@pytest.mark.parametrize("name", ["finetune_llm", "grpo", "images"])
def test_help_needs_no_library(name):
    command = [sys.executable, "-X", "importtime", str(EXAMPLES / f"{name}.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--output DIR" in result.stdout
    assert "torch" not in result.stderr


def test_language_model(tmp_path, tiny_model_dir):
    rows = [{"prompt": f"What is {i}?", "completion": f" {i}."} for i in range(20)]
    words = ["--model", str(tiny_model_dir), "--data", write_lines(tmp_path / "rows.jsonl", rows)]
    words += ["--steps", "2", "--prompt", "What is 3?"]
    folder, printed = run("finetune_llm", *words, output=tmp_path / "some outputs")
    result = json.loads((folder / "demo.json").read_text())
    paca, lora = result["reports"]["paca"], result["reports"]["lora"]
    for key in ("num_trainable_parameters", "eval_loss_before", "num_steps", "seed", "dtype"):
        assert paca[key] == lora[key], key
    assert paca["saved_activation_bytes"] < lora["saved_activation_bytes"]
    assert paca["eval_loss_after"] < paca["eval_loss_before"]
    assert f"{lora['eval_loss_after']:.4f}" in printed
    # README shows the same of the committed file.
    summary = runpy.run_path(str(EXAMPLES / "finetune_llm.py"))["summary"]
    assert summary(result) in printed
    assert result["device"].endswith("thread" if torch.get_num_threads() == 1 else "threads")
    assert (folder / "losses.png").read_bytes().startswith(b"\x89PNG")
    (answer,) = result["answers"]
    assert answer["prompt"] == "What is 3?"
    assert answer["after"] in printed
    # The commands that it prints work.
    lines = [line for line in printed.splitlines() if re.match(r"  \S*pacatune ", line)]
    generate, *others = (shlex.split(line)[1:] for line in lines)
    assert main([*generate, "--max-new-tokens", "4"]) == 0
    assert [command[0] for command in others] == ["merge", "patch"]
    assert [main(command) for command in others] == [0, 0]
    # Another run has its own folder.
    run("finetune_llm", *words, output=tmp_path / "some outputs")
    assert json.loads((folder / "demo.json").read_text()) == result


def test_rewards(tmp_path, tiny_model_dir):
    words = ["--model", str(tiny_model_dir), "--steps", "2", "--held-out", "6"]
    folder, printed = run("grpo", *words, output=tmp_path / "out")
    result = json.loads((folder / "demo-rl.json").read_text())
    assert list(result["rewards"]) == ["before", "after SFT", "after GRPO"]
    for stage, found in result["rewards"].items():
        for kind, reward in found.items():
            assert 0 <= reward <= 1
            assert f"{stage}, {kind}: mean reward {reward:.3f} of 6 new problems" in printed
    assert (folder / "grpo" / "adapter_model.safetensors").is_file()
    assert (folder / "grpo" / "reward.png").is_file()


@pytest.fixture
def image_models(tmp_path):
    """Folder with images of three colours, a tiny vision transformer and a tiny CNN."""
    before = transformers.logging.get_verbosity()  # which the script lowers
    write_images(tmp_path / "images", 10)
    save_vit(tmp_path / "vit")
    save_timm(tmp_path / "cnn")
    yield tmp_path
    transformers.logging.set_verbosity(before)


def test_image_models(image_models):
    words = [f"--model={image_models / 'vit'}", f"--model={image_models / 'cnn'}", "--steps=3"]
    words += ["--data", str(image_models / "images")]
    folder, printed = run("images", *words, output=image_models / "out")
    said = re.findall(r"(\w+), (\w+): accuracy (\S+) -> (\S+), \S+ s, (\S+) MB kept", printed)
    assert [line[:2] for line in said] == [(m, n) for m in ("vit", "cnn") for n in IMAGE_METHODS]
    for head, lora, paca in (said[:3], said[3:]):
        assert head[2] == lora[2] == paca[2]  # of the same new head
        assert float(head[4]) < float(paca[4]) < float(lora[4])
        assert (folder / paca[0] / "paca" / "adapter_model.safetensors").is_file()
    (learned,) = (line for line in said if line[:2] == ("vit", "paca"))
    assert float(learned[3]) > 0.9


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_an_image_adapter_has_the_head_and_computes_what_was_trained(image_models, name):
    path, output = str(image_models / name), image_models / "out"
    images = image_example.load_images(image_models / "images")
    trainer = image_example.make_trainer(path, "paca", images, output, 8, 1e-2, 3)
    trainer.train()
    trainer.save_model()
    base = transformers.AutoModelForImageClassification.from_pretrained(
        path, num_labels=3, ignore_mismatched_sizes=True
    )
    batch = next(iter(trainer.get_eval_dataloader()))
    loaded = PeftModel.from_pretrained(base, output).eval()
    with torch.no_grad():
        trained, found = (m(**batch).logits for m in (trainer.model.eval(), loaded))
        merged = loaded.merge_and_unload()(**batch).logits
    assert torch.equal(found, trained)
    torch.testing.assert_close(merged, trained)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_images_are_trained_in_bfloat16_on_any_machine(image_models):
    """Without a GPU as well, as the study of the dial does: transformers refused that."""
    images = image_example.load_images(image_models / "images")
    path, output = str(image_models / "vit"), image_models / "out"
    trainer = image_example.make_trainer(path, "paca", images, output, 8, 1e-2, 2, bf16=True)
    assert trainer.args.bf16
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("method", ["lora", "paca"])
def test_convolutions_with_enough_channels_are_adapted(image_models, method):
    model = transformers.AutoModelForImageClassification.from_pretrained(image_models / "cnn")
    adapted, head = image_example.adapt(model, method, 4)
    layers = {
        name: layer for name, layer in adapted.named_modules() if hasattr(layer, "base_layer")
    }
    assert head == "timm_model.classifier"
    assert all(layer.base_layer.in_channels >= 4 for layer in layers.values())
    grouped = [name for name, layer in layers.items() if layer.base_layer.groups > 1]
    assert bool(grouped) == (method == "paca")
    statistics = {n: b.clone() for n, b in adapted.named_buffers() if "running" in n}
    adapted.train()(pixel_values=torch.randn(2, 3, 64, 64))
    assert all(torch.equal(adapted.get_buffer(n), b) for n, b in statistics.items())


def test_images_without_classes_are_refused(image_models):
    with pytest.raises(SystemExit, match="put the images of each class into a folder of its name"):
        image_example.load_images(image_models / "images" / "red")
