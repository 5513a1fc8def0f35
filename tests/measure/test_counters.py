"""Bytes kept for backward, by kind of module too."""

import weakref

import pytest
import torch
from torch import nn

from pacatune.measure.counters import SavedBytes, kinds_of_modules
from pacatune.measure.models import llama_values, make_model


def test_saved_bytes_belong_to_the_layer_that_alone_keeps_them():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 8), nn.Linear(8, 4)

        def forward(self, x):
            # exp keeps its output, which is also what `second` keeps
            return self.second(self.first(x).exp())

    model = Model()
    layers = {model.first: "first", model.second: "second"}
    with SavedBytes(model, layers) as saved:
        y = model(torch.randn(5, 16))
    assert saved.num_bytes_by_kind == {"first": 5 * 16 * 4, "second": 0}
    assert saved.num_bytes == (5 * 16 + 5 * 8) * 4
    assert not model.first._forward_hooks
    assert not model.first._forward_pre_hooks
    del y


def test_what_a_nested_module_keeps_is_its_own():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 8)

        def forward(self, x):
            return self.inner(x.exp()).sigmoid()

    model = Outer()
    with SavedBytes(model, {model: "outer", model.inner: "inner"}) as saved:
        y = model(torch.randn(5, 16, requires_grad=True))
    # exp and sigmoid keep their outputs; the first is what the linear layer keeps as well.
    assert saved.num_bytes_by_kind == {"outer": (5 * 16 + 5 * 8) * 4, "inner": 0}
    del y


def test_modules_have_the_kind_of_what_they_do():
    values = llama_values(32, 1, num_heads=2, vocab_size=64)
    model = make_model(values, torch.float32, torch.device("cpu"), seed=0)
    kinds = kinds_of_modules(model)
    counted = {kind: list(kinds.values()).count(kind) for kind in kinds.values()}
    assert counted == {
        "embedding": 1,
        "attention": 1,
        "linear": 7,
        "mlp": 1,
        "norm": 3,
        "head": 1,
    }


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
        y = model[0](x).sum() + model[1](x[:2]).sum()
    assert saved.num_bytes == x.nbytes
    del y


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


def test_a_graph_that_is_dropped_keeps_nothing():
    """Its memory is free again at once, and others may take it."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 32)

        def forward(self, x):
            scale = (self.linear.weight * 2).square().exp().mean().detach()
            return self.linear(x) * scale

    model, x = Normed(), torch.randn(4, 64)
    with SavedBytes(model, {model.linear: "linear"}) as saved:
        y = model(x).sum()
    # the factor is on a storage of its own, the one number that the product keeps
    assert saved.num_bytes == x.nbytes + 4
    y.backward()
    assert saved.num_bytes == x.nbytes + 4
    assert saved.num_bytes_by_kind == {"linear": x.nbytes}


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
