"""Interrupted in any way and resumed, a run ends with the very tensors of one that was not."""

import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from pacatune.cli import main
from pacatune.training import PacaSection, TrainingInterrupted, train
from pacatune.training.sft import TextTrainer
from tests.forks import Program, run_python
from tests.training.launching import COMMAND, save_config

SIXTEEN_STEPS = {"num_train_epochs": 2, "save_total_limit": 20}


def dropout_config(make_config, tmp_path, name):
    """LoRA with dropout: random numbers in every step must continue where they were."""
    from pacatune.training import LoraSection

    training = {**SIXTEEN_STEPS, "output_dir": str(tmp_path / name)}
    return make_config("lora", training=training, lora=LoraSection(lora_dropout=0.3))


def assert_same_run(first, second):
    names = ["adapter_model.safetensors", "checkpoint-16/adapter_model.safetensors"]
    for name in names:
        one, two = load_file(first / name), load_file(second / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (first, second)]
    for key in ("eval_loss_before", "eval_loss_after", "train_loss", "train_losses", "eval_losses"):
        assert reports[0][key] == reports[1][key], key
    optimizers = [
        torch.load(folder / "checkpoint-16" / "optimizer.pt", weights_only=True)
        for folder in (first, second)
    ]
    for number, state in optimizers[0]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, optimizers[1]["state"][number][key])


def kill_at_random_step(config, tmp_path):
    """Run in a process of its own and kill it somewhere between two checkpoints."""
    path = tmp_path / "run.yaml"
    save_config(config, path)
    program = Program(COMMAND, "train", "--config", path)
    folder = tmp_path / "killed"
    while not (folder / "checkpoint-4").exists():
        assert program.is_alive(), program.wait().stderr
        time.sleep(0.01)
    time.sleep(int.from_bytes(os.urandom(1)) / 255 * 0.3)
    program.send_signal(signal.SIGKILL)
    assert program.wait().returncode == -signal.SIGKILL
    assert not (folder / "report.json").exists()


def test_sigkill(make_config, tmp_path, console):
    train(dropout_config(make_config, tmp_path, "whole"), console=console)
    config = dropout_config(make_config, tmp_path, "killed")
    kill_at_random_step(config, tmp_path)
    assert main(["train", "--config", str(tmp_path / "killed/config.yaml"), "--resume"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def stop_at(monkeypatch, step, action):
    """Do something inside a training step of the trainer."""
    plain = TextTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            action()
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(TextTrainer, "training_step", training_step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_how_to_go_on(make_config, tmp_path, console, monkeypatch, number):
    train(make_config(training={**SIXTEEN_STEPS, "output_dir": str(tmp_path / "whole")}))
    config = make_config(training={**SIXTEEN_STEPS, "output_dir": str(tmp_path / "cut")})
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        stop_at(patch, 5, lambda: signal.raise_signal(number))
        with pytest.raises(
            TrainingInterrupted,
            match=r"stopped at step 5 of 16; continue with `pacatune train --config .*cut/"
            r"config.yaml --resume`",
        ):
            train(config, console=console)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert "saving a checkpoint, then stopping" in console.file.getvalue()
    assert (tmp_path / "cut" / "checkpoint-5").is_dir()
    train(config, resume=True, console=console)
    assert f"resuming after step 5: {tmp_path / 'cut' / 'checkpoint-5'}" in (
        console.file.getvalue()
    )
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_second_signal_stops_at_once(make_config, tmp_path, console, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    stop_at(monkeypatch, 5, twice)
    # A shell starts background jobs with SIGINT ignored, and tests may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            train(make_config(), console=console)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not isinstance(caught.value, TrainingInterrupted)
    assert not (tmp_path / "out" / "checkpoint-5").exists()


def test_interrupt_on_the_command_line(make_config, tmp_path, capsys, monkeypatch):
    save_config(make_config(), tmp_path / "run.yaml")
    stop_at(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 130
    assert "stopped at step 3 of 8; continue with" in capsys.readouterr().err


def test_early_stopping_counts_on(make_config, tmp_path, monkeypatch):
    """The evaluations without progress before the interruption count after it."""
    options = {
        "learning_rate": 0.5,
        "eval_steps": 1,
        "save_steps": 1,
        "num_train_epochs": 3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "save_total_limit": 20,
    }

    def config(name):
        training = {**options, "output_dir": str(tmp_path / name)}
        return make_config(training=training, early_stopping_patience=3)

    whole = train(config("whole"), console=Console(quiet=True))
    with monkeypatch.context() as patch:
        stop_at(patch, whole.num_steps - 1, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(TrainingInterrupted):
            train(config("cut"), console=Console(quiet=True))
    cut = train(config("cut"), resume=True, console=Console(quiet=True))
    assert cut.eval_losses == whole.eval_losses
    assert cut.eval_loss_after == whole.eval_loss_after


def test_overwrite_deletes_nothing_before_training_can_start(make_config, tmp_path, monkeypatch):
    train(make_config(training={"max_steps": 2}), console=Console(quiet=True))
    before = sorted(path.name for path in (tmp_path / "out").iterdir())

    def fail(*args, **kwargs):
        raise ValueError("no memory for the weights")

    monkeypatch.setattr("pacatune.training.language.LanguageTask.load_model", fail)
    with pytest.raises(ValueError, match="no memory for the weights"):
        train(make_config(), overwrite=True, console=Console(quiet=True))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_overwrite_says_what_it_deletes_first(make_config, tmp_path, console):
    config = make_config(training={"max_steps": 2, "report_to": "tensorboard"})
    train(config, console=Console(quiet=True))
    with pytest.raises(
        FileExistsError,
        match=r"out holds another run \(README.md, .*or delete it with --overwrite",
    ):
        train(config)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"did not write, .*\(notes.txt\)"):
        train(config, overwrite=True)
    (tmp_path / "out" / "notes.txt").unlink()
    train(config, overwrite=True, console=console)
    said = " ".join(console.file.getvalue().split())
    names = "README.md, .*adapter_model.safetensors, .*checkpoint-2, config.yaml, .*runs, tokenizer"
    assert re.search(f"deleting from .*/out: {names}.* loss", said)


FULL_DISK = """
import resource, sys
from pacatune.cli import main
from pacatune.training.output import run_folder
from pacatune.training.sft import TextTrainer

hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
plain = TextTrainer._save_checkpoint

def limited(self, *args):
    if self.state.global_step == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    plain(self, *args)

TextTrainer._save_checkpoint = limited
for limit in (20_000, 60_000):  # the adapter has 33 kB, the state of the optimizer 70 kB
    folder = f"{sys.argv[2]}/{limit}"
    status = main(["train", "--config", sys.argv[1], "--training.output_dir", folder])
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert status == 2, status
"""


def test_save_failure_keeps_the_previous_checkpoint(make_config, tmp_path):
    """A disk that is full at the second checkpoint, by a real limit of file sizes."""
    save_config(make_config(), tmp_path / "run.yaml")
    done = run_python(FULL_DISK, tmp_path / "run.yaml", tmp_path)
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("pacatune: error:")]
    assert len(errors) == 2
    for error, limit in zip(errors, ("20000", "60000"), strict=True):
        assert re.search("could not write .*/checkpoint-4'", error)
        assert "checkpoint-2 is intact: make room, then continue with --resume." in error
        folder = tmp_path / limit
        names = sorted(path.name for path in folder.iterdir())
        assert names == [".pacatune", "checkpoint-2", "config.yaml"]
        config = make_config(training={"output_dir": str(folder)})
        assert train(config, resume=True, console=Console(quiet=True)).num_steps == 8


@pytest.fixture
def interrupted(make_config, tmp_path, monkeypatch):
    """A run of eight steps, stopped after the fifth."""
    config = make_config()
    with monkeypatch.context() as patch:
        stop_at(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(TrainingInterrupted):
            train(config, console=Console(quiet=True))
    return config


def test_resume_refuses_other_options(interrupted, make_config):
    config = make_config(paca=PacaSection(r=8), training={"learning_rate": 1e-3})
    with pytest.raises(
        ValueError,
        match=r"other options.*\(paca.r: 16 -> 8; training.learning_rate: 0.005 -> 0.001\); "
        r"resume with `--config .*config.yaml`",
    ):
        train(config, resume=True)


def test_resume_allows_what_changes_no_number(interrupted, make_config, tmp_path):
    shutil.move(tmp_path / "out", tmp_path / "moved")
    training = {"output_dir": str(tmp_path / "moved"), "save_total_limit": 1}
    report = train(make_config(training=training), resume=True, console=Console(quiet=True))
    assert report.num_steps == 8
    assert [path.name for path in (tmp_path / "moved").glob("checkpoint-*")] == ["checkpoint-8"]


def test_resume_refuses_changed_data(interrupted, make_config, data_path, tmp_path):
    lines = data_path.read_text().splitlines()
    try:
        data_path.write_text("\n".join([*lines[:-1], lines[0]]))
        with pytest.raises(ValueError, match=r"the training data has changed since .*checkpoint-5"):
            train(make_config(), resume=True)
    finally:
        data_path.write_text("\n".join(lines) + "\n")


def test_resume_takes_the_last_complete_checkpoint(interrupted, tmp_path):
    state = tmp_path / "out/checkpoint-5/trainer_state.json"
    state.write_text(state.read_text()[:100])
    report = train(interrupted, resume=True, console=Console(quiet=True))
    assert report.num_steps == 8
    assert [step for step, _ in report.train_losses] == list(range(1, 9))


def test_resume_without_a_checkpoint(interrupted, tmp_path):
    for path in (tmp_path / "out").glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(ValueError, match="no complete checkpoint; start it again without --resume"):
        train(interrupted, resume=True)


def test_resume_of_a_run_that_only_lacks_its_result(make_config, tmp_path):
    """Killed after the last step, before the adapter was saved."""
    first = train(make_config(), console=Console(quiet=True))
    whole = load_file(tmp_path / "out/adapter_model.safetensors")
    for name in ("report.json", "adapter_model.safetensors"):
        (tmp_path / "out" / name).unlink()
    report = train(make_config(), resume=True, console=Console(quiet=True))
    again = load_file(tmp_path / "out/adapter_model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert report.train_losses == first.train_losses
    assert report.eval_loss_after == first.eval_loss_after
    assert report.step_ms is None


def test_resume_deletes_what_a_killed_save_left(interrupted, tmp_path):
    left = tmp_path / "out/.pacatune/incomplete/checkpoint-6"
    left.mkdir(parents=True)
    (left / "garbage").touch()
    train(interrupted, resume=True, console=Console(quiet=True))
    assert not (tmp_path / "out/.pacatune/incomplete").exists()
    assert not list((tmp_path / "out").rglob("garbage"))


def test_deepspeed_checkpoints_need_deepspeed(make_config, tmp_path, console):
    config = make_config(training={"max_steps": 2})
    train(config, console=console)
    (tmp_path / "out/report.json").unlink()
    state = tmp_path / "out/checkpoint-2/trainer_state.json"
    state.write_text(state.read_text().replace("a run without FSDP2 or DeepSpeed", "DeepSpeed"))
    with pytest.raises(ValueError, match=r"checkpoint-2 was saved by DeepSpeed and cannot be"):
        train(config, resume=True, console=console)
