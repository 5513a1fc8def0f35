"""torch.compile of whole models: one graph, no recompilation over steps, right numbers."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from pacatune import PacaConfig
from tests.releases import compiles_whole


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(10, 12)
        self.second = nn.Linear(12, 6)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture
def models():
    torch.manual_seed(0)
    base = Net().double()
    config = PacaConfig(r=3, target_modules=["first", "second"])
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    return model, copy.deepcopy(model)


def train(model, forward, steps, counters=None):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step in range(steps):
        x = torch.randn(70, 10, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        loss = forward(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_trains_as_eager(models, backend):
    model, twin = models
    compiled = torch.compile(model, backend=backend)
    assert train(model, compiled, 8) == pytest.approx(train(twin, twin, 8), rel=1e-10)


@compiles_whole
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_trains_as_eager_in_one_graph(models, backend):
    model, twin = models
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert train(model, compiled, 8) == pytest.approx(train(twin, twin, 8), rel=1e-10)
    assert counter.frame_count == 1


@compiles_whole
def test_compiled_after_and_between_eager_calls(models):
    """Columns that an eager call has left in the weight are not counted twice."""
    model, twin = models
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(70, 10, dtype=torch.float64)
    for _ in range(3):
        want = twin(x)
        torch.testing.assert_close(model(x), want)
        assert model.base_model.model.first.residency.is_written
        torch.testing.assert_close(compiled(x), want)
        train(model, compiled, 3)
        train(twin, twin, 3)
        assert not model.base_model.model.first.residency.is_written
    assert counter.frame_count <= 3  # columns there, columns gone, and nothing for the third round


def test_transforms_of_torch_func(models):
    """They see plain operations, even with columns in the weight from an eager call."""
    _, model = models
    layer, x = model.base_model.model.first, torch.randn(5, 10, dtype=torch.float64)
    layer(x)
    rowwise = torch.func.grad(lambda row: layer(row).square().sum())
    gradient = torch.func.vmap(rowwise)(x)
    x.requires_grad_()
    layer(x).square().sum().backward()
    torch.testing.assert_close(gradient, x.grad)
