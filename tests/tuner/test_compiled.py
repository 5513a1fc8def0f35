"""torch.compile of whole models (R8): one graph, no recompilation over steps, right numbers."""

import copy
import gc

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import get_first_incompatible_cudagraph_node

from pacatune.residency import put as put_module
from tests.releases import compiles_whole
from tests.residency.net import Net
from tests.tuner import nets
from tests.tuner.nets import layers


class Pair:
    def __init__(self, backend="aot_eager", fullgraph=True, **options):
        torch._dynamo.reset()
        torch.manual_seed(0)
        options = {"target_modules": ["first", "second"]} | options
        self.model = nets.adapt(Net().double(), **options)
        self.twin = copy.deepcopy(self.model)
        self.counter = CompileCounterWithBackend(backend)
        self.compiled = torch.compile(self.model, fullgraph=fullgraph, backend=self.counter)

    def train_alike(self, steps, forward=None, **options):
        losses = train(self.model, forward or self.compiled, steps, **options)
        assert losses == pytest.approx(train(self.twin, self.twin, steps, **options), rel=1e-10)


@pytest.fixture
def pair():
    return Pair()


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def base_layers(model):
    return [layer.base_layer for layer in layers(model).values()]


def batch(size=70, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 10, generator=generator, dtype=torch.float64)


def train(model, forward, steps, passes=1, between=lambda model: None, after=lambda model: None):
    optimizer = torch.optim.AdamW(trained(model), lr=0.05)
    losses = []
    for step in range(steps):
        for number in range(passes):
            loss = forward(batch(seed=10 * step + number)).square().mean()
            between(model)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after(model)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("is_whole", [False, pytest.param(True, marks=compiles_whole)])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_trains_as_eager(backend, is_whole):
    pair = Pair(backend, fullgraph=is_whole)
    pair.train_alike(8)
    assert pair.counter.frame_count == 1 or not is_whole


@compiles_whole
def test_graph_holds_no_adapted_weight(pair):
    """Its operators ask for it when they run; beside them only activations are computed with."""
    found = []

    def record(graph, inputs):
        found.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    train(pair.model, torch.compile(pair.model, fullgraph=True, backend=backend), 1)
    forward, backward = found
    assert forward.count("pacatune.linear.default") == 2
    assert not any("mm" in name for name in forward)
    assert backward.count("pacatune.linear_grad.default") == 1  # x asks for no gradient
    assert sum("mm" in name for name in backward) == 2  # of delta


@compiles_whole
@pytest.mark.parametrize(
    "name", ["linear", "linear_grad", "experts_products", "experts_grad_delta"]
)
def test_no_cuda_graph_records_what_runs_in_python(name):
    """It would replay a write of columns, and a wait for the sizes of groups."""
    operator = getattr(torch.ops.pacatune, name).default
    assert torch.Tag.cudagraph_unsafe in operator.tags
    graph = torch.fx.Graph()
    graph.call_function(operator)
    module = torch.fx.GraphModule(nn.Module(), graph)
    assert get_first_incompatible_cudagraph_node(module).target is operator


def evaluate(model):
    with torch.no_grad():
        model(batch(3))


def halve(model):
    with torch.no_grad():
        for parameter in trained(model):
            parameter.mul_(0.5)


@compiles_whole
@pytest.mark.parametrize(
    "options",
    [
        {"between": lambda model: model.state_dict()},
        {"passes": 3},
        {"between": evaluate},
        {"after": halve},
        {"is_held": True},
    ],
    ids=["looks", "accumulates", "evaluates", "changed", "held"],
)
def test_nothing_that_happens_between_passes_changes_the_graph(pair, options):
    """Or the numbers: every situation is one that keeps columns out, or takes them out again."""
    both = base_layers(pair.model) + base_layers(pair.twin)
    before = [layer.weight.clone() for layer in both]
    held = [layer.weight.detach() for layer in both] if options.pop("is_held", False) else []
    pair.train_alike(5, **options)
    assert pair.counter.frame_count == 1
    assert all(torch.equal(layer.weight, base) for layer, base in zip(both, before, strict=True))
    del held


@compiles_whole
def test_other_numbers_of_tokens_share_a_graph(pair):
    for number in (200, 130, 70, 20, 90):
        gradients = []
        for model, forward in ((pair.model, pair.compiled), (pair.twin, pair.twin)):
            loss = forward(batch(number)).square().sum()
            gradients.append(torch.autograd.grad(loss, trained(model)))
        torch.testing.assert_close(*gradients)
    assert pair.counter.frame_count == 2  # of the first, and of any


@compiles_whole
def test_columns_are_written_once_a_step(pair, monkeypatch):
    written = []
    put = put_module.put_columns_
    monkeypatch.setattr(
        put_module, "put_columns_", lambda *call: (written.append(call), put(*call))
    )
    optimizer = torch.optim.SGD(trained(pair.model), lr=0.05)
    for _ in range(4):
        written.clear()
        for _ in range(2):
            pair.compiled(batch()).square().mean().backward()
        optimizer.step()
        gc.collect()  # dynamo's own references to what it has seen
    assert len(written) == 2
    assert all(layer.residency.is_written for layer in layers(pair.model).values())


@compiles_whole
def test_evaluation_before_and_after_training(pair):
    """Before, a graph of plain operations, as anybody's; then one that asks."""
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(pair.compiled(batch()), pair.twin(batch()))
        pair.train_alike(2, forward=pair.model)
    assert pair.counter.frame_count == 2


@compiles_whole
def test_while_adapters_are_off(pair):
    """A backward pass in between writes columns, which the graph's next run does not see."""
    x = batch().requires_grad_()
    with pair.twin.disable_adapter():
        want = pair.twin(x)
        gradient = torch.autograd.grad(want.sum(), x)[0]
    for _ in range(2):
        loss = pair.compiled(x).square().mean()
        with pair.model.disable_adapter():
            torch.testing.assert_close(pair.compiled(x), want)
            loss.backward()
            found = pair.compiled(x)
            torch.testing.assert_close(found, want)
            torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], gradient)
    assert pair.counter.frame_count <= 3


@compiles_whole
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own question
def test_many_layers_of_one_kind_share_their_graph(pair):
    """Blocks compiled one by one: none is told from the others by a number in its graph."""
    base = nn.Sequential(*(nn.Sequential(nn.Linear(10, 10), nn.Tanh()) for _ in range(5))).double()
    pair.model = nets.adapt(base, target_modules=r"\d\.0")
    pair.twin = copy.deepcopy(pair.model)
    for block in pair.model.base_model.model:
        block.compile(fullgraph=True, backend=pair.counter)
    pair.train_alike(3, forward=pair.model)
    assert pair.counter.frame_count <= 2  # the first block's input asks for no gradient


@compiles_whole
@pytest.mark.parametrize("keep", [torch.clone, torch.detach])
def test_hooks_on_saved_tensors(pair, keep):
    """They may copy what is saved (activation offloading), or wrap it; delta is saved as well."""

    def forward(x):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            return pair.compiled(x)

    losses = train(pair.model, forward, 4)
    assert losses == pytest.approx(train(pair.twin, pair.twin, 4), rel=1e-10)


@compiles_whole
def test_what_is_kept_of_inputs():
    """Of 10 columns 2. A tanh keeps the next 12."""
    pair, found = Pair(r=2), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        pair.compiled(batch())
    assert sorted(t.numel() / 70 for t in found if 70 in t.shape) == [2, 12]


@compiles_whole
def test_what_became_of_the_base_is_not_taken_for_it(pair):
    x = batch().requires_grad_()
    loss = pair.compiled(x).sum()
    with torch.no_grad():
        base_layers(pair.model)[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="base weight was changed"):
        loss.backward()
    loss = pair.compiled(x).sum()
    pair.model.merge_adapter()
    with pytest.raises(RuntimeError, match="before the adapter was merged"):
        loss.backward()


@compiles_whole
def test_a_base_that_is_trained_as_well_is_refused(pair):
    for layer in base_layers(pair.model):
        layer.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="asks for a gradient itself"):
        pair.compiled(batch())
