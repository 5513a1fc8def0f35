"""Killed between the last step and the finished folder, a run is resumed to the same result."""

import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from pacatune.files import owned_folder
from pacatune.files.owned_folder import OwnedFolder
from pacatune.training import train
from pacatune.training.output import run_folder
from pacatune.training.trainer import RunTrainer


@pytest.fixture
def snapshots(monkeypatch, tmp_path):
    """The output folder as a kill would leave it, at each moment after the last step."""
    taken = []

    def snap(folder):
        target = tmp_path / f"killed-{len(taken)}"
        shutil.copytree(folder, target, symlinks=True)
        taken.append(target)

    publish, append = OwnedFolder.publish, owned_folder.append_rows

    def published(self, source, name, **options):
        publish(self, source, name, **options)
        if name == self.last or taken:
            snap(self.path)

    def listed(path, rows):
        append(path, rows)
        if taken:  # named, but not in its place
            snap(path.parent.parent)

    monkeypatch.setattr(OwnedFolder, "publish", published)
    monkeypatch.setattr(owned_folder, "append_rows", listed)

    def run(config, last):
        monkeypatch.setattr(OwnedFolder, "last", last, raising=False)
        train(config, console=Console(quiet=True))
        monkeypatch.undo()
        *killed, finished = taken
        assert (finished / "report.json").exists()
        return killed, finished

    return run


def resumed(make_config, folder, training, monkeypatch, **options):
    """Resume what was killed, without a step more; return its report and adapter."""

    def step(self, *args, **kwargs):
        raise AssertionError("a step was trained")

    config = make_config(training={**training, "output_dir": str(folder)}, **options)
    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "training_step", step)
        report = train(config, resume=True, console=Console(quiet=True))
    assert run_folder(folder).foreign() == []
    return report, load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("steps", [3, 7])  # in the first epoch of seven, and at its end
def test_every_moment_after_the_last_step(make_config, snapshots, monkeypatch, steps):
    training = {"max_steps": steps, "save_steps": 1, "eval_strategy": "no"}
    killed, whole = snapshots(make_config(training=training), f"checkpoint-{steps}")
    assert len(killed) > 15
    expected = load_file(whole / "adapter_model.safetensors")
    for folder in killed if steps == 3 else killed[:1]:
        report, adapter = resumed(make_config, folder, training, monkeypatch)
        assert report.num_steps == steps
        assert all(torch.equal(adapter[name], expected[name]) for name in expected)


def test_early_stopping_does_not_begin_again(make_config, snapshots, monkeypatch):
    training = {
        **{"max_steps": 6, "save_steps": 1, "eval_steps": 1, "learning_rate": 1e-30},
        **{"save_strategy": "steps", "eval_strategy": "steps"},
    }
    options = {"early_stopping_patience": 2}
    killed, whole = snapshots(make_config(training=training, **options), "checkpoint-3")
    assert not (whole / "checkpoint-4").exists()
    report, _ = resumed(make_config, killed[0], training, monkeypatch, **options)
    assert report.num_steps == 3
