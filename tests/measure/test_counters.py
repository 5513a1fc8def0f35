"""Bytes kept for backward."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pacatune.measure.counters import SavedBytes

X = torch.randn(4, 64)
LINEAR = nn.Linear(64, 32)


class Model(nn.Module):
    """Modules by name, and a function of them and an input."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


def scaled():
    """A product with a buffer, which is there anyway, as the weight is."""
    model = Model(lambda self, x: x * self.weight * self.scale)
    model.register_buffer("scale", torch.randn(64))
    model.weight = nn.Parameter(torch.ones(64))
    return model


@pytest.mark.parametrize(
    ("model", "x", "expected"),
    [
        (LINEAR, X, X.nbytes),
        (nn.Linear(64, 32, dtype=torch.bfloat16), X.bfloat16(), X.nbytes // 2),
        (nn.Linear(64, 32).requires_grad_(False), X.clone().requires_grad_(), 0),
        (Model(lambda _, x: LINEAR(x).sum() + LINEAR(x[:2]).sum(), a=LINEAR), X, X.nbytes),
        (nn.Linear(32, 8), X[:, :32], X.nbytes),  # a view's whole storage
        (scaled(), X, X.nbytes),
        (
            Model(lambda _, x: checkpoint(lambda x: F.silu(LINEAR(x)), x, use_reentrant=False)),
            X.clone().requires_grad_(),
            X.nbytes,
        ),
    ],
    ids=["input", "bfloat16", "frozen", "shared", "view", "buffer", "checkpointed"],
)
def test_each_storage_that_is_not_the_models_counts_once(model, x, expected):
    with SavedBytes(model) as saved:
        y = model(x).sum()
    y.backward()
    assert saved.num_bytes == expected


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

    def normed(self, x):
        return self.linear(x) * (self.linear.weight * 2).square().exp().mean().detach()

    model = Model(normed, linear=nn.Linear(64, 32))
    with SavedBytes(model) as saved:
        y = model(X).sum()
    # The factor is on a storage of its own, the one number that the product keeps.
    assert saved.num_bytes == X.nbytes + 4
    y.backward()
    assert saved.num_bytes == X.nbytes + 4
