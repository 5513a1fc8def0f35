"""Adapted convolutions: every way to run them (R1), and what they keep for backward.

test_every_kind.py holds what PEFT does with them, ops/test_convolution.py their gradients.
"""

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM

from pacatune import PacaConfig
from pacatune.adapters.loading import hotswap_adapter
from tests.ops.twin import bytes_kept
from tests.releases import compiles_whole, has
from tests.tuner import nets
from tests.tuner.nets import Reference, assert_equal, evaluate, fill, layers

pytestmark = [
    # torch's own remark on the reference.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    # Dynamo itself instantiates autograd Functions while it traces them.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

LAYERS = {
    "1d": lambda: nn.Conv1d(5, 4, 3, stride=2, padding=1),
    "1d depthwise": lambda: nn.Conv1d(6, 6, 4, padding=3, groups=6, bias=False),
    "2d": lambda: nn.Conv2d(5, 4, 3, padding=1),
    "2d same": lambda: nn.Conv2d(5, 4, (2, 3), padding="same", dilation=(1, 2)),
    "2d reflect": lambda: nn.Conv2d(5, 4, 3, padding=2, padding_mode="reflect"),
    "2d circular": lambda: nn.Conv2d(6, 4, 3, 2, 1, groups=2, padding_mode="circular"),
    "2d replicate": lambda: nn.Conv2d(5, 4, (2, 3), padding="same", padding_mode="replicate"),
    "2d depthwise": lambda: nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=6),
    "3d": lambda: nn.Conv3d(4, 4, (2, 3, 2), padding=1, groups=2),
}
SIZES = {1: (9,), 2: (8, 5), 3: (5, 6, 4)}
if has("timm"):
    from timm.layers import Conv2dSame

    LAYERS |= {
        "2d padded by size": lambda: Conv2dSame(5, 4, (3, 2), stride=2, dilation=(2, 1)),
        "2d padded by size, depthwise": lambda: Conv2dSame(6, 6, 3, 2, groups=6),
    }


class PadsByInput(nn.Conv2d):
    """Pads by the size of the input, as networks that come from TensorFlow do."""

    def forward(self, x):
        rows, columns = (
            (-size) % step for size, step in zip(x.shape[2:], self.stride, strict=True)
        )
        x = F.pad(x, (0, columns, 0, rows))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardises(nn.Conv2d):
    """Its output is not linear in its weight."""

    def forward(self, x):
        return self._conv_forward(x, F.layer_norm(self.weight, self.weight.shape[1:]), self.bias)


OWN_FORWARDS = {
    "pads by the input": lambda: PadsByInput(6, 6, 3, stride=2, groups=6),
    "standardises": lambda: Standardises(5, 4, 3),
}
ALL = {**LAYERS, **OWN_FORWARDS}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


def adapt(base, targets="0", **options):
    return nets.adapt(base, target_modules=targets, **{"r": 2, "paca_alpha": 3, **options})


class One:
    """A float64 layer in a model by itself, the adapted layer, and an input."""

    def __init__(self, name):
        layer = ALL[name]().double()
        self.base = nn.Sequential(layer)
        self.model = adapt(self.base)
        self.layer = layers(self.model)["0"]
        shape = layer.in_channels, *SIZES[len(layer.kernel_size)]
        self.x = torch.randn(3, *shape, dtype=torch.float64).requires_grad_()

    def check(self, *adapters, model=None):
        twin = Reference(self.base, self.model, *adapters)
        model = self.model if model is None else model
        assert_equal(model, twin, self.x, tolerance=1e-11)


@pytest.mark.parametrize("name", ALL)
def test_every_way_to_run(name):
    """One adapter, hooks, two, rows of different ones, merged."""
    one, seen = One(name), []
    one.check()
    want = evaluate(one.model, one.x)
    torch.testing.assert_close(want, one.model(one.x))
    handle = one.layer.base_layer.register_forward_hook(lambda m, args, y: seen.append(args[0]))
    one.check()
    assert any(x.shape == one.x.shape for x in seen)
    handle.remove()
    one.model.add_adapter("b", PacaConfig(r=3, target_modules="0"))
    one.layer.double()
    fill(one.model, "b", seed=1)
    mixed = evaluate(one.model, one.x, adapter_names=["b", "__base__", "default"])
    others = Reference(one.base, one.model, "b"), one.base, Reference(one.base, one.model)
    for row, other in enumerate(others):
        torch.testing.assert_close(mixed[row], other(one.x)[row])
    one.model.base_model.set_adapter(["default", "b"])
    one.check("default", "b")
    one.model.set_adapter("default")
    one.model.merge_adapter()
    torch.testing.assert_close(evaluate(one.model, one.x), want)


COMPILED = ["1d depthwise", "2d same", "2d reflect", "3d", *OWN_FORWARDS]
COMPILED += ["2d padded by size"] if has("timm") else []


@compiles_whole
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name):
    one = One(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(one.model, fullgraph=True, backend=counter)
    for seed in range(3):
        fill(one.model, seed=seed)
        one.check(model=compiled)
    assert counter.frame_count == 1


def numel_kept(one, run):
    """Number of elements that autograd keeps beside x and the layer's own tensors."""
    given = [one.x, *one.model.parameters(), *one.model.buffers()]
    return bytes_kept(lambda: run(one.x), given) // 8


def numel_of_channels(one):
    padded, _ = one.layer._padded(one.x)
    positions = padded[0, 0].numel()
    if one.layer.base_layer.padding == "same" and one.layer.base_layer.padding_mode == "zeros":
        positions += one.x.shape[3]  # an odd row of zeros below
    return len(one.x) * 2 * positions


@pytest.mark.parametrize("name", LAYERS)
def test_keeps_the_trained_channels_only(name):
    one = One(name)
    assert numel_kept(one, one.model) == numel_of_channels(one)


@compiles_whole
@pytest.mark.parametrize("name", [name for name in COMPILED if name in LAYERS])
def test_a_graph_keeps_the_kernel_besides(name):
    one = One(name)
    compiled = torch.compile(one.model, fullgraph=True, backend="aot_eager")
    kernel = one.layer.base_layer.weight.numel() + 2 * one.layer.r["default"]  # indices, twice
    assert numel_kept(one, compiled) <= numel_of_channels(one) + kernel


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


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=compiles_whole)])
def test_per_sample_gradients_by_torch_func(is_compiled):
    one = One("2d")
    rowwise = torch.func.vmap(torch.func.grad(lambda row: one.layer(row).square().sum()))
    if is_compiled:
        rowwise = torch.compile(rowwise, fullgraph=True, backend="aot_eager")
    loss = Reference(one.base, one.model)(one.x).square().sum()
    torch.testing.assert_close(rowwise(one.x.detach()), torch.autograd.grad(loss, one.x)[0])


def test_an_offloaded_layer_with_a_forward_of_its_own_is_refused():
    layer = layers(adapt(nn.Sequential(Standardises(3, 4, 3))))["0"]
    layer.base_layer.to("meta")
    assert layer.weight.is_meta
    with pytest.raises(ValueError, match="weight of a Standardises is offloaded or sharded"):
        layer(torch.randn(1, 3, 5, 5))


def test_an_adapter_of_another_kernel_size_is_refused(tmp_path):
    adapt(nn.Sequential(nn.Conv2d(3, 4, 5))).save_pretrained(tmp_path)
    base = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(RuntimeError, match=r"size mismatch.*\[4, 2, 5, 5\]"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with pytest.raises(ValueError, match=r"delta of \(4, 2, 5, 5\).* needs \(4, 2, 3, 3\)"):
        hotswap_adapter(adapt(base), tmp_path)


class TestMixersThatReadTheWeight:
    """Mamba's cached steps and its fused kernels never call their convolution."""

    @pytest.fixture
    def model(self):
        config = MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2)
        return adapt(MambaForCausalLM(config).eval(), ["conv1d"], r=8)

    def test_generation_is_that_of_the_merged_model(self, model):
        def generated(model):
            options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
            ids = torch.arange(3, 9)[None]
            result = model.generate(input_ids=ids, return_dict_in_generate=True, **options)
            return torch.stack(result.logits)

        ours = generated(model)
        with model.disable_adapter():
            base = generated(model)
        theirs = generated(model.merge_and_unload())
        torch.testing.assert_close(ours, theirs)
        assert not torch.allclose(base, theirs)

    def test_the_weight_that_is_read_trains_the_adapter_or_is_the_base(self, model):
        layer = next(iter(layers(model).values()))
        x = torch.randn(2, 32, 6)
        y = F.conv1d(x, layer.weight, layer.bias, padding=3, groups=32)
        ours = torch.autograd.grad(y.square().sum(), layer.delta_of("default"))
        theirs = torch.autograd.grad(layer(x).square().sum(), layer.delta_of("default"))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        with model.disable_adapter():
            assert layer.weight is layer.base_layer.weight
        model.merge_adapter()
        assert layer.weight is layer.base_layer.weight
