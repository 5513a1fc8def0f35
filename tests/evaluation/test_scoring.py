"""Logits of the last positions: equal to those of all, and no copies of the head's weight."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pacatune.evaluation.scoring import last_logits
from tests.conftest import build_model


class LargestResult(TorchDispatchMode):
    """Remembers the most values that one operation wrote."""

    num_values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.num_values = max(self.num_values, tensor.numel())
        return found


@pytest.mark.parametrize("is_trained", [True, False])
def test_the_heads_weight_is_not_copied_for_each_row(is_trained):
    model = build_model(300)
    weight = model.lm_head.weight.requires_grad_(is_trained)
    ids = torch.randint(3, 100, (4, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits[:, -2:]
    with LargestResult() as largest:
        found = last_logits(model, 2, input_ids=ids)
    torch.testing.assert_close(found, expected)
    assert found.shape == (4, 2, weight.shape[0])
    assert largest.num_values < 4 * weight.numel()
    assert not model.lm_head._forward_pre_hooks
