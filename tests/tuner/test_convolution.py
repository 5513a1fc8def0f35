"""Adapted convolutions: every way to run them, and what they keep for backward."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from pacatune import PacaConfig
from pacatune.ops import reference
from tests.releases import compiles_whole
from tests.tuner.conv_nets import ALL, LAYERS, adapt, layers, randomise

pytestmark = [
    # torch's own remark on the reference.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    # Dynamo itself instantiates autograd Functions while it traces them.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


def one_layer(name):
    """A float64 layer in a model by itself, the adapted layer, and an input."""
    shape, build = ALL[name]
    model = adapt(nn.Sequential(build().double()))
    return model, layers(model)[0], torch.randn(3, *shape, dtype=torch.float64)


def expected(layer, x, names=("default",)):
    """Output of the base layer's own forward with the reference's kernel, d(x) and d(deltas)."""
    base = layer.base_layer
    deltas = [layer.delta_of(name).detach().clone().requires_grad_() for name in names]
    weight = base.weight.detach()
    for name, delta in zip(names, deltas, strict=True):
        update = delta, layer.paca_indices[name], layer.scaling[name]
        weight = reference.adapted_kernel(weight, *update, base.groups)
    y = torch.func.functional_call(base, {"weight": weight}, x)
    gx, *gdeltas = torch.autograd.grad(y.square().sum(), [x, *deltas])
    return y.detach(), gx, gdeltas


def check(layer, x, run=None, names=("default",)):
    x = x.clone().requires_grad_()
    y, gx, gdeltas = expected(layer, x, names)
    layer.zero_grad()
    out = layer(x) if run is None else run(x)
    found = torch.autograd.grad(out.square().sum(), [x, *(layer.delta_of(name) for name in names)])
    for ours, theirs in zip([out.detach(), *found], [y, gx, *gdeltas], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


class ReadsTwice(nn.Conv2d):
    def forward(self, x):
        weight = self.weight
        time.sleep(0.02)
        assert self.weight is weight
        return super().forward(x)


def test_threads_that_evaluate_a_subclass_take_turns():
    """Its kernel is in the module while its own forward runs."""
    model = adapt(nn.Sequential(ReadsTwice(5, 4, 3)))
    x = torch.randn(2, 5, 6, 6)
    want = model(x).detach()
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(model, [x] * 4):
            assert torch.equal(found, want)


@pytest.mark.parametrize("name", ALL)
class TestEveryWayToRun:
    def test_one_adapter(self, name):
        model, layer, x = one_layer(name)
        check(layer, x)
        want = expected(layer, x.requires_grad_())[0]
        with torch.no_grad():
            torch.testing.assert_close(model(x), want)

    def test_hooks_on_the_base_layer(self, name):
        _, layer, x = one_layer(name)
        seen = []
        layer.base_layer.register_forward_hook(lambda module, args, y: seen.append(args[0]))
        check(layer, x)
        assert any(one.shape == x.shape for one in seen)

    def test_several_adapters(self, name):
        model, layer, x = one_layer(name)
        model.add_adapter("b", PacaConfig(r=3, target_modules="0"))
        layer.double()
        randomise(model, 1, "b")
        model.base_model.set_adapter(["default", "b"])
        check(layer, x, names=("default", "b"))

    def test_mixed_batch(self, name):
        model, layer, x = one_layer(name)
        model.add_adapter("b", PacaConfig(r=3, target_modules="0"))
        layer.double()
        randomise(model, 1, "b")
        model.eval()
        with torch.no_grad():
            mixed = model(x, adapter_names=["b", "__base__", "default"])
            torch.testing.assert_close(mixed[2], model(x)[2])
            torch.testing.assert_close(mixed[1], layer.base_layer(x)[1])
            model.set_adapter("b")
            torch.testing.assert_close(mixed[0], model(x)[0])

    @compiles_whole
    def test_compiled(self, name):
        _, layer, x = one_layer(name)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for seed in range(3):
            randomise(nn.ModuleList([layer]), seed)
            check(layer, x, run=compiled)
        assert counter.frame_count == 1

    def test_merged_and_unmerged(self, name):
        model, layer, x = one_layer(name)
        before = layer.base_layer.weight.clone()
        with torch.no_grad():
            want = model(x)
            model.merge_adapter(safe_merge=True)
            torch.testing.assert_close(model(x), want)
            model.unmerge_adapter()
        assert torch.equal(layer.base_layer.weight, before)
        groups = layer.base_layer.groups
        dense = layer.get_delta_weight("default")
        adapted = reference.adapted_kernel(
            before, layer.delta_of("default"), layer.paca_indices["default"], 1.5, groups
        )
        torch.testing.assert_close(before + dense, adapted)

    def test_disabled_and_unloaded(self, name):
        model, layer, x = one_layer(name)
        base = layer.base_layer
        with model.disable_adapter():
            assert torch.equal(model(x), base(x))
        assert model.unload()[0] is base


def numel_kept(layer, x, run):
    """Number of elements that autograd keeps beside x and the layer's own tensors."""
    own = [x, *layer.parameters(), *layer.buffers()]
    given, kept = {tensor.untyped_storage().data_ptr() for tensor in own}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x)
    return sum(kept.values())


def num_positions(layer, x):
    """Number of positions of one padded channel of one input."""
    if layer.base_layer.padding == "same" and layer.base_layer.padding_mode == "zeros":
        return (x.shape[2] + 1) * x.shape[3]  # an odd row of zeros below
    padded, _ = layer._padded(x)
    return padded[0, 0].numel()


@pytest.mark.parametrize("name", LAYERS)
def test_keeps_the_trained_channels_only(name):
    _, layer, x = one_layer(name)
    x.requires_grad_()
    positions = num_positions(layer, x)
    assert numel_kept(layer, x, layer) == len(x) * 2 * positions


@compiles_whole
@pytest.mark.parametrize("name", LAYERS)
def test_a_graph_keeps_the_kernel_besides(name):
    _, layer, x = one_layer(name)
    x.requires_grad_()
    positions = num_positions(layer, x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    kernel = layer.base_layer.weight.numel() + 2 * layer.r["default"]  # and indices, twice
    assert numel_kept(layer, x, compiled) <= len(x) * 2 * positions + kernel


@pytest.mark.parametrize("name", LAYERS)
def test_a_frozen_convolution_keeps_all_channels(name):
    """Which is why less is kept with an adapter than without one."""
    _, layer, x = one_layer(name)
    x = x.requires_grad_() * 1
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer.base_layer(x)
    assert max(tensor.shape.numel() for tensor in kept) >= x.numel()


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=compiles_whole)])
def test_per_sample_gradients_by_torch_func(is_compiled):
    _, layer, x = one_layer("2d")
    per_sample = torch.func.vmap(torch.func.grad(lambda row: layer(row).square().sum()))
    if is_compiled:
        per_sample = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    want = expected(layer, x.clone().requires_grad_())[1]
    torch.testing.assert_close(per_sample(x), want)


@pytest.mark.parametrize("name", ["1d", "2d depthwise", "3d"])
def test_unbatched_input(name):
    _, layer, x = one_layer(name)
    torch.testing.assert_close(layer(x[1]), layer(x)[1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_and_two_forwards_before_a_backward(use_reentrant):
    _, layer, x = one_layer("2d")
    delta = layer.delta_of("default")
    want = expected(layer, x.requires_grad_())
    outputs = [checkpoint(layer, x, use_reentrant=use_reentrant) for _ in range(2)]
    sum(y.square().sum() for y in outputs).backward()
    torch.testing.assert_close(x.grad, 2 * want[1])
    torch.testing.assert_close(delta.grad, 2 * want[2][0])


def test_every_change_of_delta_is_seen():
    _, layer, x = one_layer("2d depthwise")
    delta = layer.delta_of("default")
    for change in (
        lambda: delta.data.add_(0.5),
        lambda: layer.load_state_dict(
            {k: 2 * v for k, v in layer.state_dict().items() if "delta" in k}, strict=False
        ),
        lambda: setattr(delta, "data", torch.randn_like(delta)),
        lambda: layer.scale_layer(3.0),
    ):
        check(layer, x)
        change()
        check(layer, x)
