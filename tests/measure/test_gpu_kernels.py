"""The stand-ins for GPU kernels: same shapes as the real functions, bytes by formula."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pacatune.measure.counters import SavedBytes
from pacatune.measure.gpu_kernels import attention, dropout
from pacatune.measure.tracker import StorageTracker


def heads(num_heads, dim=16, length=32, dtype=torch.bfloat16):
    return torch.zeros(2, num_heads, length, dim, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(("num_kept", "dim"), [(4, 16), (2, 256)])
def test_attention_has_torchs_shapes_and_saves_no_repeated_heads_but_under_a_mask(num_kept, dim):
    q, k, v = heads(4, dim), heads(num_kept, dim), heads(num_kept, dim)
    options = {"is_causal": True, "enable_gqa": num_kept < 4}
    real = F.scaled_dot_product_attention(q, k, v, **options)
    with SavedBytes(nn.Module()) as saved:
        result = attention(q, k, v, **options)
    assert (result.shape, result.dtype) == (real.shape, real.dtype)
    assert saved.num_bytes == 2 * q.nbytes + 2 * k.nbytes + 2 * 4 * 32 * 4
    result.sum().backward()
    assert all(x.grad.shape == x.shape for x in (q, k, v))
    # With a mask heads are repeated, and a mask of floats is kept.
    q, k, v = heads(4), heads(2), heads(2)
    mask = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    with SavedBytes(nn.Module()) as saved:
        result = attention(q, k, v, mask, enable_gqa=True)
    del result
    assert saved.num_bytes == 4 * q.nbytes + 2 * 4 * 32 * 4 + 32 * 32 * 2


def test_backward_of_attention_needs_an_accumulator_and_a_gradient_per_query_head():
    q, k, v = heads(4, length=100), heads(2, length=100), heads(2, length=100)
    with StorageTracker() as tracker:
        tracker.hold([q, k, v], "weights")
        result = attention(q, k, v, enable_gqa=True)
        gradient = torch.empty_like(result)
        tracker.reset_peak()
        before = tracker.num_bytes
        result.backward(gradient)
    accumulator, row_sums = 2 * 4 * 128 * 32 * 4, 2 * 4 * 128 * 4
    own, expanded = q.nbytes + k.nbytes + v.nbytes, 2 * q.nbytes
    assert tracker.peak_bytes - before == accumulator + row_sums + own + expanded


def test_dropout_keeps_a_byte_per_element():
    x = torch.ones(4, 64, dtype=torch.bfloat16, requires_grad=True)
    with SavedBytes(nn.Module()) as saved:
        y = dropout(x, 0.5)
    assert saved.num_bytes == 4 * 64
    assert set(y.flatten().tolist()) == {0.0, 2.0}
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0) is x
