"""What needs neither torch nor PEFT waits for no import of them."""

import re
import subprocess
import sys

import pytest
import yaml

from pacatune.cli import main
from pacatune.training import TASKS
from tests.cli.conftest import run_without

HEAVY = ("torch", "transformers", "trl", "peft", "datasets")
SHOWING = ("torch", "peft", "accelerate")
RUN = "train --model.path tiny --data.path"
TYPO = "--training.learning_rte"
MEANT = "did you mean '--training.learning_rate'?"


@pytest.fixture
def folder(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_model_dir)
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "typo.yaml").write_text("training: {learning_rte: 1}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"train {TYPO} 1", f"unknown option {TYPO}; {MEANT}"),
        ("train --config typo.yaml", "unknown key 'training.learning_rte'; did you mean 'training"),
    ],
)
def test_a_name_is_checked_without_them(folder, words, message):
    done = run_without(HEAVY, words.split())
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(f"pacatune: error: .*{re.escape(message)}.*\n", done.stderr)


@pytest.mark.parametrize("flag", ["--print_config", "--resume", "--auto_resume"])
def test_a_run_that_reads_no_files(folder, flag, capsys):
    status = main([*RUN.split(), "no.jsonl", flag])
    assert status == (0 if flag == "--print_config" else 2)
    assert ("no.jsonl does not exist" in capsys.readouterr().err) == (flag == "--auto_resume")


@pytest.mark.parametrize("task", TASKS)
def test_options_are_shown_without_torch_as_with_it(task, shown):
    words = ["train", "--task", task, "--print_config"]
    done = run_without(SHOWING, words)
    assert (done.returncode, done.stderr) == (0, "")
    assert yaml.safe_load(shown(*words)) == yaml.safe_load(done.stdout)


def test_help_of_training():
    done = run_without(SHOWING, ["train", "--help"])
    assert (done.returncode, done.stderr) == (0, "")
    assert "Number of trained input columns of each weight" in done.stdout


def test_help_of_the_module():
    command = [sys.executable, "-X", "importtime", "-m", "pacatune", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: pacatune" in done.stdout
    assert "pacatune.cli.entry" in done.stderr
    assert not re.search(rf"\| +({'|'.join(HEAVY)})$", done.stderr, re.MULTILINE)
