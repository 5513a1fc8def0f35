import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

from pacatune.memory import SavedBytes, peak_process_bytes


def saved_by(model, x):
    with SavedBytes(model) as saved:
        y = model(x).sum()
    y.backward()
    return saved.num_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_keeps_its_input_once_and_no_weight(dtype):
    model = nn.Linear(64, 32, dtype=dtype)
    x = torch.randn(4, 64, dtype=dtype)
    assert saved_by(model, x) == x.nbytes


def test_frozen_linear_keeps_nothing_but_for_its_input_gradient():
    model = nn.Linear(64, 32).requires_grad_(False)
    assert saved_by(model, torch.randn(4, 64, requires_grad=True)) == 0


def test_input_of_two_layers_counts_once():
    model = nn.ModuleList([nn.Linear(64, 32), nn.Linear(64, 32)])
    x = torch.randn(4, 64)
    with SavedBytes(model) as saved:
        model[0](x).sum() + model[1](x[:2]).sum()
    assert saved.num_bytes == x.nbytes


def test_whole_storage_of_a_view_counts():
    x = torch.randn(4, 64)
    assert saved_by(nn.Linear(32, 8), x[:, :32]) == x.nbytes


def test_buffers_do_not_count():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.randn(64))
            self.weight = nn.Parameter(torch.ones(64))

        def forward(self, x):
            return x * self.weight * self.scale

    x = torch.randn(4, 64)
    assert saved_by(Scale(), x) == x.nbytes


def test_outputs_that_are_kept_count_and_are_freed():
    """exp keeps its own output; a count that held it too would keep the graph alive for ever."""

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    with SavedBytes(nn.Module()) as saved:
        y = Probe.apply(torch.randn(4, 64, requires_grad=True)).exp()
    assert saved.num_bytes == y.nbytes
    alive = weakref.ref(y.grad_fn.next_functions[0][0])
    assert alive() is not None
    del y
    assert alive() is None


def test_gradients_are_the_same_under_the_hooks():
    model = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.LayerNorm(16), nn.Linear(16, 4))
    x = torch.randn(8, 16)
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with SavedBytes(model):
        loss = model(x).square().sum()
    loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True))


def test_checkpointed_block_keeps_its_input_only():
    from torch.utils.checkpoint import checkpoint

    block = nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 64))
    x = torch.randn(4, 64, requires_grad=True)
    with SavedBytes(block) as saved:
        y = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
    y.sum().backward()
    assert saved.num_bytes == x.nbytes


def test_peak_of_the_process_grows_with_what_it_holds():
    code = (
        "from pacatune.memory import peak_process_bytes\n"
        "before = peak_process_bytes()\n"
        "block = bytearray(300 * 2**20)\n"
        "block[::4096] = b'x' * len(block[::4096])\n"
        "print(peak_process_bytes() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 250 * 2**20 < int(done.stdout) < 350 * 2**20
    assert peak_process_bytes() > 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot forget a peak")
def test_peak_of_the_process_can_start_anew():
    code = (
        "from pacatune.memory import peak_process_bytes, reset_peak_process_bytes\n"
        "before = peak_process_bytes()\n"
        "block = bytearray(300 * 2**20)\n"
        "block[::4096] = b'x' * len(block[::4096])\n"
        "del block\n"
        "reset_peak_process_bytes()\n"
        "print(peak_process_bytes() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50 * 2**20
