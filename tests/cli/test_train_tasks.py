"""`pacatune train --task`: which options there are, and what a config file may not name."""

import sys

import pytest
import yaml

from pacatune.cli.train import all_options, find_task, names_of_tasks, take_rewards
from pacatune.training import RunConfig
from tests.data.conftest import write_lines

REWARD = "def short(completions, **kwargs):\n    return [-len(text) / 10 for text in completions]\n"
GIVEN = ["--reward", "my_rewards:short"]


@pytest.fixture
def folder(tiny_model_dir, tmp_path, monkeypatch):
    """A folder with prompts.jsonl, my_rewards.py and grpo.yaml."""
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"Count {i}"} for i in range(16)])
    (tmp_path / "my_rewards.py").write_text(REWARD)
    training = {"max_steps": 2, "report_to": "none", "use_cpu": True, "bf16": False}
    training |= {"num_generations": 2, "max_completion_length": 4, "output_dir": "grpo-run"}
    data = {"path": "prompts.jsonl", "eval_fraction": 0.25}
    values = {"model": {"path": str(tiny_model_dir)}, "data": data, "training": training}
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    yield tmp_path
    sys.modules.pop("my_rewards", None)


def test_grpo_with_a_function(folder, shown, refused):
    start = ["train", "--task", "grpo", "--config", "grpo.yaml"]
    assert refused(*start).startswith("there is no reward; give one on the command line, as in `--")
    assert "held-out reward after" in shown(*start, *GIVEN)
    text = (folder / "grpo-run" / "config.yaml").read_text()
    assert text.splitlines()[0].endswith("--config config.yaml --reward my_rewards:short")
    # The file names the function, and does not run it by itself.
    assert "- my_rewards:short" in text
    again = ["train", "--config", "grpo-run/config.yaml", "--training.output_dir", "again"]
    said = refused(*again)
    assert said.startswith("`reward` ('my_rewards:short') is a Python function, and a config file")
    assert not (folder / "again").exists()
    shown(*again, *GIVEN)


def test_a_config_file_runs_no_code(folder, shown, refused):
    (folder / "evil.py").write_text("open('ran', 'w')\ndef f(**kwargs): ...\n")
    with (folder / "grpo.yaml").open("a") as file:
        file.write("task: grpo\nreward: ['evil:f']\n")
    words = ["train", "--config", "grpo.yaml"]
    assert "a config file runs no code by itself" in refused(*words)
    assert not (folder / "ran").exists()
    shown(*words, "--reward=my_rewards:short")  # instead of the file's
    assert not (folder / "ran").exists()


def test_find_task(tmp_path):
    (tmp_path / "c.yaml").write_text("method: lora\n")
    (tmp_path / "d.yaml").write_text("task: reward\n")
    one, two = (["--config", str(tmp_path / name)] for name in ("c.yaml", "d.yaml"))
    found = [find_task(words) for words in (one, ["--task=rloo", *one], two)]
    assert found == ["sft", "rloo", "reward"]


def test_take_rewards():
    for words in (["--reward", "a:f", "--reward=b:g"], ["--reward+", "[a:f, 'b:g']"]):
        rest, found = take_rewards(["--method", "lora", *words])
        assert (rest[:2], len(rest), found) == (["--method", "lora"], 3, ["a:f", "b:g"])
    assert take_rewards(["--method", "lora"]) == (["--method", "lora"], [])


@pytest.mark.parametrize("task", names_of_tasks())
def test_template_is_a_config_file(task, tmp_path, shown):
    (tmp_path / "c.yaml").write_text(shown("train", "--task", task, "--print_config"))
    options = all_options(find_task(["--config", str(tmp_path / "c.yaml")]))
    assert options.task == task
    words = ["--config", str(tmp_path / "c.yaml"), "--model.path", "m", "--data.path", "d"]
    words += ["--training.use_cpu", "true"]
    if task in ("grpo", "rloo"):
        words = take_rewards([*words, "--reward", "a:f"])[0]
    assert RunConfig(**options.parse(words).values).task == task
