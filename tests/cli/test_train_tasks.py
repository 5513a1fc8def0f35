"""`pacatune train --task`: which options there are, and what a config file may not name."""

import json
import sys

import pytest
import yaml

from pacatune.cli import main
from pacatune.cli.train import all_options, find_task, names_of_tasks, take_rewards

REWARD = "def short(completions, **kwargs):\n    return [-len(text) / 10 for text in completions]\n"


@pytest.fixture
def folder(tiny_model_dir, tmp_path, monkeypatch):
    """A folder with pairs.jsonl, prompts.jsonl, my_rewards.py, dpo.yaml and grpo.yaml."""
    pairs = [
        {"prompt": f"{i}?", "chosen": f" {7 * i % 10}", "rejected": " no idea"} for i in range(16)
    ]
    prompts = [{"prompt": f"Count {i}"} for i in range(16)]
    for name, rows in (("pairs", pairs), ("prompts", prompts)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "my_rewards.py").write_text(REWARD)
    training = {"max_steps": 2, "report_to": "none", "use_cpu": True, "bf16": False}
    samples = {"num_generations": 2, "max_completion_length": 4}
    for task, data, more in (("dpo", "pairs", {}), ("grpo", "prompts", samples)):
        values = {
            "model": {"path": str(tiny_model_dir)},
            "data": {"path": f"{data}.jsonl", "eval_fraction": 0.25},
            "training": {**training, **more, "output_dir": f"{task}-run"},
        }
        (tmp_path / f"{task}.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    yield tmp_path
    sys.modules.pop("my_rewards", None)


def error_of(capsys, *words):
    assert main(["train", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("pacatune: error: ")
    return lines[-1].removeprefix("pacatune: error: ")


def test_dpo_from_a_file(folder, capsys):
    assert main(["train", "--task", "dpo", "--config", "dpo.yaml"]) == 0
    assert "held-out reward margin after" in capsys.readouterr().out
    values = yaml.safe_load((folder / "dpo-run" / "config.yaml").read_text())
    assert next(iter(values)) == "task"
    assert values["task"] == "dpo"


def test_a_saved_file_names_its_task(folder, capsys):
    path = folder / "dpo-run" / "config.yaml"
    words = ["--training.output_dir", "again"]
    assert main(["train", "--task", "dpo", "--config", "dpo.yaml"]) == 0
    assert main(["train", "--config", str(path), *words]) == 0
    assert "is finished; there is nothing to resume" in (
        error_of(capsys, "--config", str(path), "--resume")
    )


def test_grpo_with_a_function(folder, capsys):
    words = ["train", "--task", "grpo", "--config", "grpo.yaml", "--reward", "my_rewards:short"]
    assert main(words) == 0
    assert "held-out reward after" in capsys.readouterr().out
    text = (folder / "grpo-run" / "config.yaml").read_text()
    assert text.splitlines()[0].endswith("--config config.yaml --reward my_rewards:short")
    # The file names the function, and does not run it by itself.
    assert "- my_rewards:short" in text
    path = str(folder / "grpo-run" / "config.yaml")
    again = ["--config", path, "--training.output_dir", "again"]
    message = error_of(capsys, *again)
    assert message == (
        "`reward` ('my_rewards:short') is a Python function, and a config file runs no code by "
        "itself; give it on the command line: --reward my_rewards:short"
    )
    assert not (folder / "again").exists()
    assert main(["train", *again, "--reward", "my_rewards:short"]) == 0


def test_a_config_file_runs_no_code(folder, capsys):
    (folder / "evil.py").write_text("open('ran', 'w')\ndef f(**kwargs): ...\n")
    with (folder / "grpo.yaml").open("a") as file:
        file.write("task: grpo\nreward: ['evil:f']\n")
    assert "a config file runs no code by itself" in error_of(capsys, "--config", "grpo.yaml")
    assert not (folder / "ran").exists()
    assert "my_rewards:short" not in sys.modules
    words = ["train", "--config", "grpo.yaml", "--reward=my_rewards:short"]
    assert main(words) == 0  # instead of the file's
    assert not (folder / "ran").exists()


def test_without_a_reward(folder, capsys):
    message = error_of(capsys, "--task", "grpo", "--config", "grpo.yaml")
    assert message.startswith("there is no reward; give one on the command line, as in `--reward")


def test_resume_gives_the_rewards_again(folder, capsys):
    words = ["--task", "grpo", "--config", "grpo.yaml", "--reward", "my_rewards:short"]
    (folder / "my_rewards.py").write_text(
        "calls = []\n\n\ndef short(completions, **kwargs):\n    calls.append(1)\n"
        "    if len(calls) > 3:\n        raise OSError('gone')\n"
        "    return [0.5] * len(completions)\n"
    )
    message = error_of(capsys, *words, "--training.save_steps", "1")
    assert "reward 'my_rewards:short' raised OSError (gone) on " in message
    assert "then continue from grpo-run/checkpoint-1 with --resume" in message
    (folder / "my_rewards.py").write_text(REWARD)
    del sys.modules["my_rewards"]
    again = ["--config", "grpo-run/config.yaml", "--reward", "my_rewards:short", "--resume"]
    assert main(["train", *again]) == 0


@pytest.mark.parametrize(
    ("words", "text", "task"),
    [
        ([], "", "sft"),
        (["--task", "kto"], "", "kto"),
        (["--task=rloo"], "", "rloo"),
        ([], "task: reward\n", "reward"),
        (["--task", "dpo"], "task: dpo\n", "dpo"),
    ],
)
def test_find_task(tmp_path, words, text, task):
    (tmp_path / "c.yaml").write_text(text + "method: lora\n")
    assert find_task([*words, "--config", str(tmp_path / "c.yaml")]) == task


@pytest.mark.parametrize(
    ("words", "text", "message"),
    [
        (["--task", "dop"], "", r"`--task` \('dop'\) must be one of sft, dpo, .* 'dpo'\?"),
        ([], "task: [a]\n", r"`task of .*c.yaml` \(.*\) must be one of sft"),
    ],
)
def test_wrong_tasks(tmp_path, words, text, message):
    (tmp_path / "c.yaml").write_text(text + "method: lora\n")
    with pytest.raises(ValueError, match=message):
        find_task([*words, "--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(
    ("words", "rewards"),
    [
        (["--reward", "a:f", "--reward=b:g"], ["a:f", "b:g"]),
        (["--reward", "[a:f, 'b:g']"], ["a:f", "b:g"]),
        (["--reward+", "a:f"], ["a:f"]),
        ([], []),
    ],
)
def test_take_rewards(words, rewards):
    rest, found = take_rewards(["--method", "lora", *words])
    assert found == rewards
    assert rest[:2] == ["--method", "lora"]
    assert len(rest) == (3 if rewards else 2)


@pytest.mark.parametrize("task", names_of_tasks())
def test_template_is_a_config_file(task, tmp_path, capsys):
    assert main(["train", "--task", task, "--print_config"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "c.yaml").write_text(text)
    options = all_options(find_task(["--config", str(tmp_path / "c.yaml")]))
    assert options.task == task
    words = ["--config", str(tmp_path / "c.yaml"), "--model.path", "m", "--data.path", "d"]
    words += ["--training.use_cpu", "true"]
    if task in ("grpo", "rloo"):
        words = take_rewards([*words, "--reward", "a:f"])[0]
    assert options.to_config(options.parse(words)).task == task


def test_options_of_another_task(folder, capsys):
    message = error_of(capsys, "--config", "dpo.yaml", "--reward", "a:f")
    assert message.startswith("unknown option --reward; ")
    message = error_of(capsys, "--task", "kto", "--config", "dpo.yaml", "--data.format", "text")
    assert message.startswith("unknown option --data.format; ")


def test_help_names_the_tasks(capsys):
    assert main(["train", "--task", "dpo", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "These are the options of the task dpo; those of others (sft, kto, reward, grpo, r" in out
    )
    assert "--training.beta" in out
