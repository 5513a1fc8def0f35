import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from pacatune.training.progress import Meter, ProgressReporter, peak_memory_bytes
from pacatune.training.sft import TextTrainer

ARGUMENTS = SimpleNamespace(disable_tqdm=False)


def state(step, total=40):
    return SimpleNamespace(global_step=step, max_steps=total)


def test_meter_takes_the_median_without_the_first_step():
    meter = Meter()
    assert meter.step_ms is None
    assert meter.items_per_second == 0
    meter.step_seconds[:] = [9.0]
    assert meter.step_ms == 9000
    meter.step_seconds[:] = [9.0, 0.1, 0.5, 0.3]
    assert meter.step_ms == pytest.approx(300)
    meter.step_seconds[:] = [9.0, 0.1, 0.3]
    assert meter.step_ms == pytest.approx(200)


def test_meter_counts_numbers_and_tensors():
    meter = Meter()
    meter.add(torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).sum())
    meter.add(10)
    meter.step_seconds[:] = [2.0]
    assert meter.items_per_second == (8 + 10) / 2


def test_meter_times_steps():
    meter = Meter()
    meter.on_step_begin()
    meter.on_step_end()
    assert len(meter.step_seconds) == 1
    assert meter.step_seconds[0] >= 0


def lines(force_terminal=False, **console):
    out = io.StringIO()
    meter = Meter()
    meter.step_seconds[:], meter.num_items = [1.0], 100
    options = {"width": 200, "force_terminal": force_terminal, **console}
    reporter = ProgressReporter(Console(file=out, **options), meter)
    reporter.on_train_begin(ARGUMENTS, state(0))
    reporter.on_log(ARGUMENTS, state(0), None, logs={"eval_loss": 3.0, "step": 0})
    for step in range(1, 41):
        reporter.on_step_end(ARGUMENTS, state(step))
        reporter.on_log(ARGUMENTS, state(step), None, logs={"loss": 2.0, "grad_norm": 1.0})
    reporter.close()
    return out.getvalue()


def test_lines_where_there_is_no_terminal():
    text = lines()
    assert text.startswith("step 0/40: evaluation loss 3.0000\n")
    assert "step 40/40: loss 2.0000  100 tokens/s  peak " in text
    assert text.count("\n") == 22


def test_rewards_are_shown_and_not_their_loss():
    out = io.StringIO()
    reporter = ProgressReporter(Console(file=out, width=200), Meter())
    for logs in ({"eval_loss": 0.0, "eval_reward": 0.5}, {"loss": 0.0, "reward": 0.25}):
        reporter.on_log(ARGUMENTS, state(1), None, logs=logs)
    first, second = out.getvalue().splitlines()
    assert first == "step 1/40: evaluation reward 0.5000"
    assert second.startswith("step 1/40: reward 0.2500  0 tokens/s")


def test_bar_on_a_terminal():
    text = lines(force_terminal=True)
    assert "step 40/40" in text
    assert "loss 2.0000  100 tokens/s  peak" in text


def test_quiet():
    assert lines(quiet=True) == ""


def test_peak_memory_of_the_process():
    num_bytes, kind = peak_memory_bytes()
    assert kind == (
        "cuda_max_memory_allocated" if torch.cuda.is_available() else "process_peak_resident"
    )
    assert num_bytes > 2**20


def test_padding_is_not_counted():
    ids = torch.zeros(2, 5, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert TextTrainer.num_items(None, {"input_ids": ids, "attention_mask": mask}) == 8
    assert TextTrainer.num_items(None, {"input_ids": ids}) == 10
