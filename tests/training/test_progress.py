import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from pacatune.training.progress import Meter, ProgressReporter
from pacatune.training.sft import TextTrainer

ARGUMENTS = SimpleNamespace(disable_tqdm=False)


def state(step):
    return SimpleNamespace(global_step=step, max_steps=40)


def test_meter():
    """Its time is the median without the first step; items are numbers or tensors."""
    meter = Meter()
    assert (meter.step_ms, meter.items_per_second) == (None, 0)
    meter.on_step_begin()
    meter.on_step_end()
    assert len(meter.step_seconds) == 1
    assert meter.step_seconds[0] >= 0
    for seconds, milliseconds in (([9.0], 9000), ([9.0, 0.1, 0.5, 0.3], 300), ([9, 0.1, 0.3], 200)):
        meter.step_seconds[:] = seconds
        assert meter.step_ms == pytest.approx(milliseconds)
    ids, mask = torch.zeros(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    meter.add(TextTrainer.num_items(None, {"input_ids": ids, "attention_mask": mask}))
    meter.add(TextTrainer.num_items(None, {"input_ids": ids}))
    meter.step_seconds[:] = [2.0]
    assert meter.items_per_second == (8 + 10) / 2  # padding is not counted


def lines(**options):
    console = Console(file=io.StringIO(), **{"width": 200, "force_terminal": False, **options})
    meter = Meter()
    meter.step_seconds[:], meter.num_items = [1.0], 100
    reporter = ProgressReporter(console, meter)
    reporter.on_train_begin(ARGUMENTS, state(0))
    reporter.on_log(ARGUMENTS, state(0), None, logs={"eval_loss": 3.0, "step": 0})
    for step in range(1, 41):
        reporter.on_step_end(ARGUMENTS, state(step))
        reporter.on_log(ARGUMENTS, state(step), None, logs={"loss": 2.0, "grad_norm": 1.0})
    reporter.close()
    return console.file.getvalue()


def test_what_is_shown():
    text = lines()
    assert text.startswith("step 0/40: evaluation loss 3.0000\n")
    assert "step 40/40: loss 2.0000  100 tokens/s  peak " in text
    assert text.count("\n") == 22
    bar = lines(force_terminal=True)
    assert "step 40/40" in bar
    assert "loss 2.0000  100 tokens/s  peak" in bar
    assert lines(quiet=True) == ""
