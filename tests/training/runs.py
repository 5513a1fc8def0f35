"""Runs of tiny models: declared, stopped, resumed, and compared with runs that were not."""

import json
import signal
from dataclasses import fields

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainingArguments

from pacatune.training import TrainingInterrupted, recipe, train
from pacatune.training.language import Task
from pacatune.training.output import last_checkpoint
from pacatune.training.trainer import RunTrainer

QUIET = Console(quiet=True)
ADAPTER = "adapter_model.safetensors"
# Renamed within version 5 of transformers.
CHECKPOINTING = next(
    field.name
    for field in fields(TrainingArguments)
    if field.name in ("activation_checkpointing", "gradient_checkpointing")
)
MEASURED = {
    *("step_ms", "tokens_per_second"),
    *("peak_memory_bytes", "saved_activation_bytes"),
}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_json(*parts):
    return json.loads(parts[0].joinpath(*parts[1:]).read_text())


def make_trainer(config):
    task = Task(config)
    return recipe.make_trainer(task, None, QUIET)


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


def stop_at(monkeypatch, step, action):
    """Do something in the middle of a training step, once."""
    plain, todo = RunTrainer.compute_loss, [action]

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == step - 1 and torch.is_grad_enabled() and todo:
            todo.pop()()
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "compute_loss", compute_loss)


def interrupt(config, monkeypatch, step, number=signal.SIGINT, console=QUIET):
    """Stop a run by a signal in a step; return what it says."""
    with monkeypatch.context() as patch:
        stop_at(patch, step, lambda: signal.raise_signal(number))
        with pytest.raises(TrainingInterrupted) as caught:
            train(config, console=console)
    return str(caught.value)


def refused(message, config, **options):
    with pytest.raises((ValueError, TypeError, OSError, ImportError), match=message):
        train(config, console=QUIET, **options)


def assert_same(first, second, name=ADAPTER):
    """Two folders have the same tensors, bit for bit."""
    assert_equal(load_file(first / name), load_file(second / name))


def assert_close(first, second, name=ADAPTER, **tolerances):
    """Two folders have the same tensors, but for rounding."""
    torch.testing.assert_close(load_file(first / name), load_file(second / name), **tolerances)


def assert_equal(first, second):
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    else:
        assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def assert_same_run(first, second):
    """Two runs have the same weights, states of the optimizer and results, times aside."""
    checkpoint = last_checkpoint(first)
    files = [*first.glob("*.safetensors"), *checkpoint.glob("*.safetensors")]
    assert len(files) == 2
    for path in files:
        assert_same(first, second, path.relative_to(first))
    states = (folder / checkpoint.name / "optimizer.pt" for folder in (first, second))
    assert_equal(*(torch.load(path, weights_only=True) for path in states))
    reports = [read_json(folder, "report.json") for folder in (first, second)]
    assert_equal(*({k: one[k] for k in one if k not in MEASURED} for one in reports))
