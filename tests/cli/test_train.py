"""`pacatune train`: from words and config files to a run."""

import re
from dataclasses import fields

import pytest
import yaml

from pacatune.cli import main
from pacatune.cli.train import fields_in_source, read, take_rewards
from pacatune.training import TASKS
from pacatune.training.arguments import training_class
from tests.data.conftest import write_lines


@pytest.fixture
def data_path(tmp_path):
    rows = [{"prompt": f"What is {i}?", "completion": f" It is {7 * i % 10}."} for i in range(24)]
    return write_lines(tmp_path / "d.jsonl", rows)


@pytest.fixture
def words(tiny_model_dir, data_path, tmp_path, monkeypatch):
    """Least words of a run that works, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    given = {"model.path": tiny_model_dir, "data.path": data_path, "training.output_dir": "out"}
    return ["train", *to_words(given)]


def to_words(given):
    given = {**given, "training.max_steps": 2, "training.use_cpu": "true"}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def test_run_from_words_alone(words, tmp_path, shown, refused):
    assert "adapter, report and model card are in" in shown(*words)
    assert any((tmp_path / "out" / "runs").rglob("events.out.tfevents.*"))
    assert "holds another run" in refused(*words)
    assert "deleting from" in shown(*words, "--overwrite")


def test_template_explains_every_key_and_is_a_config(words, tmp_path, shown):
    """What comes later overrides: words a file, and a file the words before it."""
    text = shown("train", "--print_config")
    lines = text.splitlines()
    for line, before in zip(lines[1:], lines, strict=False):
        if line.startswith("  ") and not line.lstrip().startswith("#"):
            assert before.lstrip().startswith("#"), line
    (tmp_path / "template.yaml").write_text(text)
    (tmp_path / "run.yaml").write_text(
        "method: lora\npaca: {r: 4}\n"
        "training: {learning_rate: 1e-3, eval_strategy: no, report_to: none, max_steps: 1}\n"
    )
    files = ["--config", "template.yaml", *words[1:], "--config", "run.yaml"]
    assert main(["train", *files, "--method", "paca"]) == 0
    (path,) = tmp_path.glob("*/config.yaml")
    values = yaml.safe_load(path.read_text())
    assert (values["method"], values["paca"]["r"]) == ("paca", 4)
    expected = {"learning_rate": 1e-3, "eval_strategy": "no", "max_steps": 1}
    assert values["training"].items() >= expected.items()


def test_template_shows_what_is_given(shown):
    text = shown("train", "--print_config", "--paca.r", "3", "--paca.rank_pattern.q_proj", "2")
    values = yaml.safe_load(text)
    assert {"learning_rate", "packing", "fsdp_config"} <= values["training"].keys()
    assert (values["paca"]["r"], values["paca"]["rank_pattern"]) == (3, {"q_proj": 2})
    # Nothing of it is left for the next command of this process.
    assert yaml.safe_load(shown("train", "--print_config"))["paca"]["r"] == 16


@pytest.mark.parametrize("words", [["train"], ["train", "--task", "grpo"]])
def test_help_begins_with_what_most_runs_set(words, shown):
    short, everything = shown(*words, "--help"), shown(*words, "--help", "all")
    few, many = (re.findall(r"^  --([\w.]+)[ ,]", text, re.M) for text in (short, everything))
    assert {"config", "method", "model.path", "data.path", "paca.r", "resume"} <= {*few}
    assert len(few) <= 24
    assert {*few} <= {*many}
    assert {"training.optim", "lora.r", "auto_resume"} <= {*many} - {*few}
    assert len(short.splitlines()) < 130
    (number,) = re.findall(r"^(\d+) more, among them", short, re.M)
    assert int(number) > 100


@pytest.mark.parametrize(
    ("words", "section"),
    [
        (["--method=qpaca", "--task", "dpo"], "paca"),
        (["--config", "lora.yaml"], "lora"),
        (["--config", "lora.yaml", "--method", "full"], None),
    ],
)
def test_help_of_a_method_has_its_options(words, section, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora.yaml").write_text("method: lora\n")
    short, everything = shown("train", *words, "--help"), shown("train", "--help", "all")
    few, many = (re.findall(r"^  --([\w.]+)[ ,]", text, re.M) for text in (short, everything))
    adapters = ("paca.", "lora.")
    expected = {name for name in many if section and name.startswith(f"{section}.")}
    assert {name for name in few if name.startswith(adapters)} == expected
    assert {"model.path", "training.learning_rate"} <= {*few}


def test_preview_shows_the_mask_and_loads_no_model(words, shown, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    out = shown(*words, "--preview", 2)
    assert out.count("tokens,") == 2
    assert "<s>What is 0?[[ It is 0.</s>]]" in out
    assert not (tmp_path / "out").exists()


def test_a_run_that_both_decides_and_is_told(words, tmp_path, refused):
    said = refused(*words, "--auto_resume", "--overwrite")
    assert "--auto_resume decides what --resume and --overwrite" in said
    assert not (tmp_path / "out").exists()


GIVEN = ["--reward", "my_rewards:short"]


@pytest.fixture
def folder(tiny_model_dir, tmp_path, rewards_module):
    """A folder with prompts.jsonl, my_rewards.py and grpo.yaml."""
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"Count {i}"} for i in range(16)])
    training = {"max_steps": 2, "report_to": "none", "use_cpu": True, "bf16": False}
    training |= {"num_generations": 2, "max_completion_length": 4, "output_dir": "grpo-run"}
    data = {"path": "prompts.jsonl", "eval_fraction": 0.25}
    values = {"model": {"path": str(tiny_model_dir)}, "data": data, "training": training}
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def test_grpo_with_a_function(folder, shown, refused):
    start = ["train", "--task", "grpo", "--config", "grpo.yaml"]
    assert refused(*start).startswith("there is no reward; give one on the command line, as in `--")
    assert "held-out reward after" in shown(*start, *GIVEN)
    text = (folder / "grpo-run" / "config.yaml").read_text()
    assert text.splitlines()[0].endswith("--config config.yaml --reward my_rewards:short")
    # The file names the function, and does not run it by itself.
    assert "- my_rewards:short" in text
    again = ["train", "--config", "grpo-run/config.yaml", "--training.output_dir", "again"]
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


@pytest.mark.parametrize("task", TASKS)
def test_names_of_options_are_read_from_the_source(task):
    names = {option.name for option in fields(training_class(task)) if option.init}
    assert fields_in_source(TASKS[task].arguments.rpartition(".")[2]) == names


def test_take_rewards():
    for words in (["--reward", "a:f", "--reward=b:g"], ["--reward+", "[a:f, 'b:g']"]):
        rest, found = take_rewards(["--method", "lora", *words])
        assert (rest[:2], len(rest), found) == (["--method", "lora"], 3, ["a:f", "b:g"])
    assert take_rewards(["--method", "lora"]) == (["--method", "lora"], [])


@pytest.mark.parametrize("task", TASKS)
def test_template_is_a_config_file(task, tmp_path, shown):
    (tmp_path / "c.yaml").write_text(shown("train", "--task", task, "--print_config"))
    words = ["--config", str(tmp_path / "c.yaml")]
    words += ["--model.path", "m", "--data.path", "d"]
    words += ["--training.use_cpu", "true"]
    if task in ("grpo", "rloo"):
        words += ["--reward", "a:f"]
    assert read(words)[0].task == task
