"""Bytes kept for backward belong to one kind of module each."""

import torch
from torch import nn

from pacatune.bench.model import make_model
from pacatune.bench.saved import SavedByLayer, kinds_of_modules
from pacatune.bench.shape import llama_values


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
    with SavedByLayer(model, layers) as saved:
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
    with SavedByLayer(model, {model: "outer", model.inner: "inner"}) as saved:
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
