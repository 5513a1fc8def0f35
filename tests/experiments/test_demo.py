"""`pacatune demo` as a user runs it, on a tiny model and data of one's own."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from pacatune.cli import demo as command
from pacatune.cli import main
from pacatune.data.packaged import prepare_questions
from pacatune.experiments import demo
from pacatune.training import Report


@pytest.fixture(scope="module")
def words(tmp_path_factory, tiny_model_dir):
    """The command for a tiny model and 20 rows."""
    folder = tmp_path_factory.mktemp("demo inputs")
    shutil.copytree(tiny_model_dir, folder / "model")
    config = folder / "model" / "config.json"
    longer = json.loads(config.read_text()) | {"max_position_embeddings": 2048}
    config.write_text(json.dumps(longer))
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(20):
            file.write(json.dumps({"prompt": f"What is {i}?", "completion": f" {i}."}) + "\n")
    given = ["--model", str(folder / "model"), "--data", str(folder / "rows.jsonl")]
    return ["demo", *given, "--steps", "2", "--prompt", "What is 3?"]


def test_result_has_both_runs_at_equal_numbers_of_parameters(finished):
    folder, lines = finished
    result = json.loads((folder / "demo.json").read_text())
    assert result["finished"]
    paca, lora = result["reports"]["paca"], result["reports"]["lora"]
    assert paca["num_trainable_parameters"] == lora["num_trainable_parameters"]
    assert paca["eval_loss_before"] == lora["eval_loss_before"]
    for key in ("num_steps", "seed", "dtype", "device", "num_train_examples"):
        assert paca[key] == lora[key], key
    assert paca["saved_activation_bytes"] < lora["saved_activation_bytes"]
    assert paca["eval_loss_after"] < paca["eval_loss_before"]

    table = "\n".join(lines[lines.index(next(line for line in lines if "PEFT LoRA" in line)) :])
    assert f"PaCA, r={result['ranks']['paca']}" in table
    for report in (paca, lora):
        assert f"{report['eval_loss_after']:.4f}" in table
        assert f"{report['step_ms']:,.0f} ms" in table
    assert "rounded to 4 bits" not in table  # only true of the demo's own model


def test_answers_are_those_of_the_model_with_and_without_the_adapter(finished, words, capsys):
    folder, _ = finished
    answer = json.loads((folder / "demo.json").read_text())["answers"][0]
    assert answer["prompt"] == "What is 3?"
    asked = ["generate", "--model", words[2], "--adapter", str(folder / "paca")]
    asked += ["--prompt", "What is 3?", "--max-new-tokens", str(demo.MAX_ANSWER_TOKENS)]
    for key, more in (("after", []), ("before", ["--without-adapter"])):
        assert main([*asked, *more]) == 0
        assert capsys.readouterr().out.strip() == answer[key]


def test_printed_commands_work(finished, monkeypatch, capsys):
    folder, lines = finished
    commands = [shlex.split(line) for line in lines if re.match(r"  \S*pacatune", line)]
    assert [command[1] for command in commands] == ["generate", "merge", "export", "inspect"]
    for program, *rest in commands:
        assert Path(shutil.which(program)).name == "pacatune"
        assert main(rest) == 0
    assert Path(f"{folder}-merged", "model.safetensors").is_file()
    assert Path(f"{folder}-exported-lora", "adapter_config.json").is_file()


def test_second_demo_replaces_the_first_alone(finished, words, capsys):
    folder, _ = finished
    notes = folder / "paca" / "notes.txt"
    notes.write_text("mine")
    before = (folder / "paca" / "adapter_model.safetensors").read_bytes()
    assert main([*words, "--seed", "1", "--output", str(folder)]) == 2
    assert "(paca/notes.txt); they stay as they are" in capsys.readouterr().err
    notes.unlink()
    assert main([*words, "--seed", "1", "--output", str(folder)]) == 0
    assert (folder / "paca" / "adapter_model.safetensors").read_bytes() != before
    assert json.loads((folder / "demo.json").read_text())["reports"]["lora"]["seed"] == 1


def test_folder_of_somebody_else_is_refused(tmp_path, words, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    assert main([*words, "--output", str(tmp_path)]) == 2
    assert (
        "that a demo did not write, or that were changed since (thesis.tex)"
        in capsys.readouterr().err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_folder_of_an_interrupted_demo_is_taken(tmp_path):
    demo.result_folder(tmp_path / "out").start_anew()
    demo.result_folder(tmp_path / "out").start_anew()
    assert demo.result_folder(tmp_path / "out").is_ours


@pytest.mark.parametrize("steps", ["0", "-1", "many", "1.5"])
def test_steps_must_be_a_number(steps, capsys):
    assert main(["demo", "--steps", steps]) == 2
    assert f"'{steps}' is not a number of at least 1" in capsys.readouterr().err


def test_missing_model_is_named(tmp_path, words, capsys):
    given = ["--model", str(tmp_path / "nothing"), *words[3:]]
    assert main(["demo", *given, "--output", str(tmp_path / "out")]) == 2
    assert "nothing" in capsys.readouterr().err


def test_dtype_is_the_faster_one(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    times = {torch.float32: 2.0, torch.bfloat16: 1.0}
    monkeypatch.setattr(demo, "_matmul_seconds", lambda *dtypes: times)
    assert demo.faster_dtype() == "bfloat16"
    times[torch.bfloat16] = 1.9
    assert demo.faster_dtype() == "float32"


def test_measured_times_are_those_of_a_product():
    num_threads = torch.get_num_threads()
    seconds = demo._matmul_seconds(torch.float32, torch.bfloat16, num_repeats=2)
    assert list(seconds) == [torch.float32, torch.bfloat16]
    assert all(1e-6 < value < 10 for value in seconds.values())
    assert torch.get_num_threads() == num_threads


def test_runs_on_unequal_cores_are_told(finished):
    report = Report(**json.loads((finished[0] / "demo.json").read_text())["reports"]["paca"])
    quiet, busy = (demo.Outcome(report=report, num_cores=number) for number in (1.8, 0.9))
    assert demo.unequal_cores({"paca": quiet, "lora": quiet}) == []
    (told,) = demo.unequal_cores({"paca": quiet, "lora": busy})
    assert "the runs had 1.8 and 0.9 processor cores. Compare step times on an idle" in told


def test_prompts_are_not_in_the_data(tmp_path):
    pytest.importorskip("chatterbot_corpus")
    train, heldout = prepare_questions(tmp_path)
    text = (train.read_text() + heldout.read_text()).casefold()
    for prompt in command.PROMPTS:
        assert prompt.casefold().rstrip("?.") not in text
