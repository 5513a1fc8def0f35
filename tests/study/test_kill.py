"""A study that is stopped in the middle of a run goes on where it was."""

import json
import os
import signal
import time

import pytest
import yaml

from pacatune.files.owned_folder import OwnedFolder
from pacatune.study.config import read_study
from pacatune.study.tasks import StudyTask
from pacatune.training.language import LanguageTrainer
from tests.forks import Program
from tests.study.conftest import run

# Runs a study whose third run never ends.
SCRIPT = """
import sys, time
from pathlib import Path
from rich.console import Console
from pacatune.study import run_study
from pacatune.study.tasks import StudyTask
from pacatune.study.config import read_study

train, started = StudyTask.run, []

def slow(self, config):
    started.append(config)
    if len(started) == 3:
        Path(sys.argv[3]).touch()
        time.sleep(600)
    return train(self, config)

StudyTask.run = slow
run_study(read_study(Path(sys.argv[1])), Path(sys.argv[2]), console=Console(quiet=True))
"""


@pytest.fixture
def study(class_options, tmp_path):
    content = {
        "command": "classify",
        "options": class_options,
        "arms": {"a": {"rank": 2}, "b": {"rank": 4}},
        "seeds": [0, 1],
        "learning_rates": {"paca": [1e-3]},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def started(monkeypatch):
    """Rank and seed of each run that begins in this process."""
    runs, train = [], StudyTask.run

    def remember(self, config):
        runs.append((config.paca.r, config.training.seed))
        return train(self, config)

    monkeypatch.setattr(StudyTask, "run", remember)
    return runs


@pytest.mark.slow
def test_killed(study, started, tmp_path):
    mark, out = tmp_path / "mark", tmp_path / "out"
    program = Program(SCRIPT, study, out, mark)
    limit = time.monotonic() + 300
    while not mark.exists():
        assert program.is_alive(), program.wait().stderr
        assert time.monotonic() < limit
        time.sleep(0.05)
    program.send_signal(signal.SIGKILL)
    program.wait()
    assert len(list((out / "jobs").glob("[!.]*"))) == 2
    assert json.loads((out / "study.json").read_text()) == {"finished": False}
    result, _ = run(read_study(study), out)
    assert started == [(2, 1), (4, 1)]
    assert [[name, *sorted(arm.values)] for name, arm in result.arms.items()] == [
        ["a", 0, 1],
        ["b", 0, 1],
    ]
    assert json.loads((out / "study.json").read_text())["finished"] is True


def test_signal_in_the_middle_of_a_run_and_two_at_once(study, started, tmp_path, monkeypatch):
    step, out = LanguageTrainer.training_step, tmp_path / "out"
    with OwnedFolder(path=out, kind="a study").going_on():  # noqa: SIM117 (the folder is taken)
        with pytest.raises(ValueError, match="another run is at work"):
            run(read_study(study), out)
    assert not started

    def signalled(self, *args, **kwargs):
        if len(started) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LanguageTrainer, "training_step", signalled)
    with pytest.raises(KeyboardInterrupt, match="stopped with 1 of 4 runs done; the same command"):
        run(read_study(study), out)
    monkeypatch.setattr(LanguageTrainer, "training_step", step)
    run(read_study(study), out)
    assert started == [(2, 0), (4, 0), (4, 0), (2, 1), (4, 1)]
