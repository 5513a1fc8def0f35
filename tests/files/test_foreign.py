"""Nothing of a user's is lost, whatever lies where a command writes, and whenever it is killed."""

from pathlib import Path

import pytest

from pacatune.cli import main
from tests.forks import run_python
from tests.patch.conftest import contents
from tests.releases import needs

pytestmark = [needs("trl"), needs("matplotlib")]  # commands of more than the core

FOLDERS = """
import sys
from tests.files.foreign import try_folders
sys.exit(bool(try_folders(50)))
"""


@pytest.mark.slow
def test_fifty_random_folders():
    done = run_python(FOLDERS)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("flag", [[], ["--overwrite"], ["--auto_resume"]])
def test_files_of_the_names_of_ours(flag, tiny_model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text('{"prompt": "What is 1?", "completion": "It is 7."}\n')
    names = ("README.md", "config.yaml", "runs/mine/e", "vocab.txt")
    Path("own/runs/mine").mkdir(parents=True)
    for name in names:
        Path("own", name).write_text("x: 1\n")
    before = contents(tmp_path)
    words = ["--model.path", str(tiny_model_dir), "--data.path", "data.jsonl"]
    assert main(["train", *words, "--training.output_dir", "own", *flag]) == 2
    assert contents(tmp_path) == before
    said = f"did not write, or that were changed since ({', '.join(names)})"
    assert said in capsys.readouterr().err
