"""Nothing of a user's is lost, whatever lies where a command writes, and whenever it is killed."""

import json
import shutil

import pytest

from pacatune.cli import main
from tests.forks import run_python
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


@pytest.fixture
def project(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = json.dumps({"prompt": "What is 1?", "completion": "It is 7."}) + "\n"
    (tmp_path / "data.jsonl").write_text(row)
    return tmp_path


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x: 1\n")


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def refused(project, capsys):
    """Run `train`, which is refused and leaves all files as they are; return what it says."""

    def run(model, *words):
        before = contents(project)
        command = ["train", "--model.path", str(model), "--data.path", "data.jsonl"]
        assert main([*command, "--training.max_steps", "3", *words]) == 2
        assert contents(project) == before
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("flag", [[], ["--overwrite"], ["--auto_resume"]])
def test_places_that_are_the_users(project, tiny_model_dir, refused, flag):
    # Files of the names of ours.
    names = ("config.yaml", "README.md", "vocab.txt", "runs/mine/e")
    write(project / "own", *names)
    said = refused(tiny_model_dir, "--training.output_dir", "own", *flag)
    assert f"did not write, or that were changed since ({', '.join(sorted(names))})" in said
    # The current folder.
    write(project, "config.yaml", "tokenizer_train.py", "tokenizers/mine.py", "completions/d.txt")
    said = refused(tiny_model_dir, "--training.output_dir", ".", *flag)
    assert "`data.path`" in said
    assert "lies in the output folder ., which this run writes; choose another" in said
    # The folder of the model.
    shutil.copytree(tiny_model_dir, project / "t5")
    write(project / "t5", "config.yaml")
    said = refused("t5", "--training.output_dir", "t5", *flag)
    assert "`model.path`" in said
    assert "lies in the output folder t5" in said
    assert "--overwrite" not in said
