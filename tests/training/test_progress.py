import pytest
import torch

from pacatune.training.progress import Meter
from pacatune.training.sft import TextTrainer


def test_meter():
    """Its time is the median without the first step; items are numbers or tensors."""
    meter = Meter()
    assert (meter.step_ms, meter.items_per_second) == (None, 0)
    for seconds, milliseconds in (([9.0], 9000), ([9.0, 0.1, 0.5, 0.3], 300), ([9, 0.1, 0.3], 200)):
        meter.step_seconds[:] = seconds
        assert meter.step_ms == pytest.approx(milliseconds)
    ids, mask = torch.zeros(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    meter.add(TextTrainer.num_items(None, {"input_ids": ids, "attention_mask": mask}))
    meter.add(TextTrainer.num_items(None, {"input_ids": ids}))
    meter.step_seconds[:] = [2.0]
    assert meter.items_per_second == (8 + 10) / 2  # padding is not counted
