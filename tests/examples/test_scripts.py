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

from pacatune.cli import main
from tests.data.conftest import write_lines
from tests.image_models import save_timm, save_vit, write_images

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


def test_image_models(tmp_path):
    write_images(tmp_path / "images", 10)
    words = ["--model", str(save_vit(tmp_path / "vit"))]
    words += ["--model", str(save_timm(tmp_path / "cnn"))]
    words += ["--data", str(tmp_path / "images"), "--image-size", "32", "--steps", "3"]
    folder, printed = run("images", *words, output=tmp_path / "out")
    result = json.loads((folder / "demo.json").read_text())
    assert [Path(name).name for name in result] == ["vit", "cnn"]
    for name, reports in result.items():
        head, lora, paca = (reports[method] for method in ("head", "lora", "paca"))
        for key in ("accuracy_before", "eval_loss_before", "num_steps", "seed", "image_size"):
            assert head[key] == lora[key] == paca[key], key
        assert head["saved_activation_bytes"] < paca["saved_activation_bytes"]
        assert paca["saved_activation_bytes"] < lora["saved_activation_bytes"]
        assert (folder / f"{Path(name).name}.png").is_file()
        assert f"{paca['accuracy_after']:.3f}" in printed
