import json
import re
import subprocess
import sys

import pytest
import yaml

from pacatune.cli import main
from pacatune.cli.train import all_options


@pytest.fixture
def data_path(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [{"prompt": f"What is {i}?", "completion": f" It is {7 * i % 10}."} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def words(tiny_model_dir, data_path, tmp_path):
    """Least words of a run that works."""
    return [
        "train",
        *("--model.path", str(tiny_model_dir)),
        *("--data.path", str(data_path)),
        *("--training.output_dir", str(tmp_path / "out")),
        *("--training.max_steps", "2"),
        *("--training.use_cpu", "true"),
    ]


def error_of(capsys, words):
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("pacatune: error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1].removeprefix("pacatune: error: ")


def test_run_from_words_alone(words, tmp_path, capsys):
    assert main(words) == 0
    assert "adapter, report and model card are in" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "PACA"
    assert any((tmp_path / "out" / "runs").rglob("events.out.tfevents.*"))


def test_words_override_the_config_file(words, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "method: lora\npaca: {r: 4}\ntraining:\n  learning_rate: 1e-3\n  eval_strategy: no\n"
        "  report_to: none\n"
    )
    override = ["--method", "paca", "--paca.rank_pattern.q_proj", "2"]
    assert main([*words, "--config", str(path), *override]) == 0
    values = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert values["method"] == "paca"
    assert values["paca"]["r"] == 4
    assert values["paca"]["rank_pattern"] == {"q_proj": 2}
    assert values["training"]["learning_rate"] == 1e-3
    assert values["training"]["eval_strategy"] == "no"


def test_second_run_is_refused_and_overwritten_on_demand(words, capsys):
    assert main(words) == 0
    assert "holds another run" in error_of(capsys, words)
    assert main([*words, "--overwrite"]) == 0
    assert "deleting from" in capsys.readouterr().out


def test_preview_shows_the_mask_and_trains_nothing(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    assert main([*words, "--preview", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("tokens,") == 2
    assert "<s>What is 0?[[ It is 0.</s>]]" in out
    assert not (tmp_path / "out").exists()


def test_preview_of_weights_and_of_tools_that_the_template_drops(
    words, data_path, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    turns = [
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "No.", "weight": 0},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Yes."},
    ]
    data_path.write_text(json.dumps({"messages": turns}) + "\n")
    words = [*words, "--data.eval_fraction", "0", "--preview", "1"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "No.</s>" in out
    assert re.findall(r"\[\[(.*?)\]\]", out) == ["Yes.</s>", " and "]
    call = {"function": {"name": "look", "arguments": {"at": "x"}}}
    turns[3] = {"role": "assistant", "content": None, "tool_calls": [call]}
    data_path.write_text(json.dumps({"messages": turns}) + "\n")
    message = error_of(capsys, words)
    assert f"{data_path}, row 1: the chat template does not show tool_calls of turn 4" in message
    assert "`data.chat_template`" in message


@pytest.mark.parametrize("number", ["0", "-1", "x"])
def test_preview_of_a_wrong_number(words, capsys, number):
    assert "preview" in error_of(capsys, [*words, "--preview", number])


def test_preview_says_what_is_cut(words, capsys):
    assert main([*words, "--preview", "1", "--training.max_length", "10"]) == 0
    out = capsys.readouterr().out
    assert "10 tokens (cut from " in out
    assert "are cut at `training.max_length` (10) and never learn to stop" in out


def test_negative_number_is_a_value(words, capsys):
    for number in ("-1e-3", "-.5", "-1"):
        found = error_of(capsys, [*words, "--training.learning_rate", number])
        assert found.startswith(f"`training.learning_rate` ({float(number)}) must be above 0")


def test_unknown_option_names_the_nearest(words, capsys):
    assert error_of(capsys, [*words, "--training.lerning_rate", "1"]).startswith(
        "unknown option --training.lerning_rate; did you mean '--training.learning_rate'?"
    )


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("training: {learning_rte: 1}", "training.learning_rte", "training.learning_rate"),
        ("max_steps: 1", "max_steps", "training.max_steps"),
        ("learning_rte: 1", "learning_rte", "training.learning_rate"),
        ("modell: {path: x}", "modell", "model"),
    ],
)
def test_unknown_key_names_the_nearest(words, capsys, tmp_path, text, key, nearest):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    message = error_of(capsys, [*words, f"--config={path}"])
    assert f"run.yaml: unknown key '{key}'; did you mean '{nearest}'?" in message


def test_flag_in_a_config_file(words, capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("resume: true")
    message = error_of(capsys, [*words, "--config", str(path)])
    assert message.endswith("run.yaml: 'resume' belongs on the command line, as --resume.")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--training.learning_rate", "fast"], "training.learning_rate"),
        (["--method", "adapter"], "method"),
        (["--paca.r", "0"], "`r` (0) must be an integer of at least 1"),
        (["--paca.r", "3.5"], "paca.r"),
        (["--paca.selection", "best"], "`paca.selection` ('best') is no strategy"),
        (["--data.loss", "answers"], "data.loss"),
        (["--data.format", "alpaca"], "data.format"),
        (["--data.path", "missing.jsonl"], "missing.jsonl does not exist; check `data.path`"),
        (["--data.path", ""], "`data.path` is ''; give"),
        (["--model.path", ""], "`model.path` is ''; give a hub id"),
        (["--config", "missing.yaml"], "config file missing.yaml does not exist"),
        (["--resume"], "holds no run to resume"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["--training.report_to", "nobody"], "`training.report_to` ('nobody') is not installed"),
        (["--training.optim", "best"], "best"),
        (["stray"], "stray"),
    ],
)
def test_user_errors_are_one_line(words, capsys, tmp_path, extra, message):
    assert message in error_of(capsys, [*words, *extra])
    assert not (tmp_path / "out").exists()


def test_template_explains_every_key_and_is_a_config(words, capsys, tmp_path):
    assert main(["train", "--print_config"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    for line, before in zip(lines[1:], lines, strict=False):
        if line.startswith("  ") and not line.lstrip().startswith("#"):
            assert before.lstrip().startswith("#"), line
    keys = set(yaml.safe_load(text)["training"])
    assert {"learning_rate", "packing", "fsdp_config", "neftune_noise_alpha"} <= keys
    path = tmp_path / "template.yaml"
    path.write_text(text)
    assert main([*words, "--config", str(path), *words[1:]]) == 0


def test_template_shows_what_is_given(capsys):
    assert main(["train", "--print_config", "--paca.r", "3", "--data.path", "x.csv"]) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert values["paca"]["r"] == 3
    assert values["data"]["path"] == "x.csv"
    assert values["paca"]["target_modules"] is None


def test_help(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--training.gradient_accumulation_steps" in out
    assert "Number of trained input columns of each weight" in out


def test_every_option_has_help():
    for action in all_options().parser._actions:
        assert action.help, action.dest


def test_as_a_module(words):
    command = [sys.executable, "-m", "pacatune.cli", *words, "--preview", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[[ It is 0.</s>]]" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("model.quantization", "nf5", "'nf4', 'fp4', 'int8'"),
        ("paca.r", "x", "int"),
        ("training.learning_rate", "abc", "float"),
        ("paca.rank_pattern", "3", "dict"),
        ("paca.layers_to_transform", "a", "list"),
        ("method", "lore", "paca, qpaca, lora, "),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(option, value, rule, capsys):
    error = error_of(capsys, ["train", f"--{option}", value])
    assert all(part in error for part in (option, value, rule))


def test_did_you_mean_another_method(capsys):
    assert "did you mean 'lora'?" in error_of(capsys, ["train", "--method", "lore"])
