"""torch.compile of whole models: one graph, no recompilation over steps, right numbers."""

import copy
import gc

import pytest
import torch
from functorch.compile import make_boxed_func
from peft import get_peft_model
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from pacatune import PacaConfig
from pacatune.residency import put as put_module
from pacatune.tuner import PacaLayer
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
def models(request):
    torch.manual_seed(0)
    base = Net().double()
    groups = getattr(request, "param", 1)
    config = PacaConfig(r=3, groups=groups, target_modules=["first", "second"])
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    return model, copy.deepcopy(model)


def adapted_layers(model):
    return [module for module in model.modules() if isinstance(module, PacaLayer)]


def base_layers(model):
    return [layer.base_layer for layer in adapted_layers(model)]


def train(model, forward, steps, passes=1, between=lambda model: None, after=lambda model: None):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for _ in range(passes):
            x = torch.randn(70, 10, generator=generator, dtype=torch.float64)
            loss = forward(x).square().mean()
            between(model)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after(model)
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
def test_graph_holds_no_adapted_weight(models):
    """Its operators ask for it when they run; beside them only activations are computed with."""
    model, _ = models
    found = []

    def record(graph, inputs):
        found.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    train(model, compiled, 1)
    forward, backward = found
    assert forward.count("pacatune.linear.default") == 2
    assert not any("mm" in name for name in forward)
    assert backward.count("pacatune.linear_grad.default") == 1  # x asks for no gradient
    assert sum("mm" in name for name in backward) == 2  # of delta


@compiles_whole
@pytest.mark.parametrize("situation", ["looks", "accumulates", "held", "evaluates", "changed"])
def test_nothing_that_happens_between_passes_changes_the_graph(models, situation):
    """Or the numbers: every situation is one that keeps columns out, or takes them out again."""
    model, twin = models
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    held, bases = [], []
    for each in (model, twin):
        bases.append([layer.weight.clone() for layer in base_layers(each)])
        if situation == "held":
            held.append([layer.weight.detach() for layer in base_layers(each)])
        if situation == "evaluates":
            with torch.no_grad():
                each(torch.randn(3, 10, dtype=torch.float64))

    def between(each):
        if situation == "looks":
            each.state_dict()
        if situation == "evaluates":
            with torch.no_grad():
                each(torch.randn(3, 10, dtype=torch.float64))

    def change(each):
        if situation == "changed":
            with torch.no_grad():
                for parameter in each.parameters():
                    if parameter.requires_grad:
                        parameter.mul_(0.5)

    passes = 3 if situation == "accumulates" else 1
    losses = [
        train(each, forward, 5, passes, between, change)
        for each, forward in ((model, compiled), (twin, twin))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert counter.frame_count == 1
    for each, base in zip((model, twin), bases, strict=True):
        for layer, weight in zip(base_layers(each), base, strict=True):
            assert torch.equal(layer.weight, weight)


@compiles_whole
@pytest.mark.parametrize("models", [1, 3], indirect=True, ids=["plain", "groups"])
def test_other_numbers_of_tokens_share_a_graph(models):
    model, twin = models
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for number in (200, 130, 70, 20, 90):
        x = torch.randn(number, 10, dtype=torch.float64)
        gradients = []
        for each, forward in ((model, compiled), (twin, twin)):
            forward(x).square().sum().backward()
            gradients.append([p.grad for p in each.parameters() if p.grad is not None])
            for parameter in each.parameters():
                parameter.grad = None
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 2  # of the first, and of any


@compiles_whole
def test_columns_are_written_once_a_step(models, monkeypatch):
    model, _ = models
    written = []
    put = put_module.put_columns_
    monkeypatch.setattr(
        put_module, "put_columns_", lambda *call: (written.append(call), put(*call))
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    x = torch.randn(70, 10, dtype=torch.float64)
    for _ in range(4):
        written.clear()
        for _ in range(2):
            compiled(x).square().mean().backward()
        optimizer.step()
        gc.collect()  # dynamo's own references to what it has seen
    assert len(written) == 2
    assert all(layer.residency.is_written for layer in adapted_layers(model))


@compiles_whole
def test_compiled_evaluation_with_and_without_columns(models):
    model, twin = models
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(70, 10, dtype=torch.float64)
    want = twin(x)
    for _ in range(3):
        for call in (lambda: model(x), lambda: model.state_dict()):  # columns there, and gone
            call()
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), want)
    assert counter.frame_count == 1


@compiles_whole
def test_compiled_evaluation_before_and_after_training(models):
    """Before, a graph of plain operations, as anybody's; then one that asks."""
    model, twin = models
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(70, 10, dtype=torch.float64)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), twin(x))
        train(model, model, 2)
        train(twin, twin, 2)
    assert counter.frame_count == 2


@compiles_whole
def test_compiled_while_adapters_are_off(models):
    """A backward pass in between writes columns, which the graph's next run does not see."""
    model, twin = models
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(70, 10, dtype=torch.float64, requires_grad=True)
    with twin.disable_adapter():
        want = twin(x)
        gradient = torch.autograd.grad(want.sum(), x)[0]
    for _ in range(2):
        loss = compiled(x).square().mean()
        with model.disable_adapter():
            torch.testing.assert_close(compiled(x), want)
            loss.backward()
            found = compiled(x)
            torch.testing.assert_close(found, want)
            torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], gradient)
    assert counter.frame_count <= 3


@compiles_whole
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own question
def test_many_layers_of_one_kind_share_their_graph():
    """Blocks compiled one by one: none is told from the others by a number in its graph."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Sequential(nn.Linear(10, 10), nn.Tanh()) for _ in range(5))).double()
    config = PacaConfig(r=3, target_modules=r"\d\.0")
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.base_model.model:
        block.compile(fullgraph=True, backend=counter)
    assert train(model, model, 3) == pytest.approx(train(twin, twin, 3), rel=1e-10)
    assert counter.frame_count <= 2  # the first block's input asks for no gradient


@compiles_whole
@pytest.mark.parametrize("copies", [True, False])
def test_hooks_on_saved_tensors(models, copies):
    """They may copy what is saved (activation offloading), or wrap it; delta is saved as well."""
    model, twin = models
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def forward(x):
        keep = (lambda t: t.clone()) if copies else (lambda t: t.detach())
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            return compiled(x)

    assert train(model, forward, 4) == pytest.approx(train(twin, twin, 4), rel=1e-10)


@compiles_whole
def test_what_became_of_the_base_is_not_taken_for_it(models):
    model, _ = models
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(70, 10, dtype=torch.float64, requires_grad=True)
    loss = compiled(x).sum()
    with torch.no_grad():
        base_layers(model)[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="base weight was changed"):
        loss.backward()
    loss = compiled(x).sum()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="before the adapter was merged"):
        loss.backward()


@compiles_whole
def test_a_base_that_is_trained_as_well_is_refused(models):
    model, _ = models
    for layer in base_layers(model):
        layer.weight.requires_grad_()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="asks for a gradient itself"):
        compiled(torch.randn(70, 10, dtype=torch.float64))


@compiles_whole
def test_a_view_of_a_larger_buffer_is_left_alone(models):
    """As the flat parameters of FSDP1 are."""
    model, twin = models
    for each in models:
        for layer in base_layers(each):
            buffer = torch.zeros(2, *layer.weight.shape, dtype=torch.float64)
            buffer[0] = layer.weight
            layer.weight = nn.Parameter(buffer[0], requires_grad=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert train(model, compiled, 4) == pytest.approx(train(twin, twin, 4), rel=1e-10)
    assert not any(layer.residency.is_written for layer in adapted_layers(model))


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
