"""BatchNorm layers that keep nothing: equal to torch's in all they compute."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pacatune import lean
from pacatune.measure.counters import SavedBytes
from tests.lean.functions import CASES, STATISTICS, frozen_batch_norm
from tests.releases import has, needs

SHAPE = (4, 6, 5, 3)


def layer_of(kind, **options):
    """A frozen layer in evaluation mode whose statistics and affine map are not the identity."""
    layer = kind(6, **options).requires_grad_(False).eval()
    with torch.no_grad():
        for name in STATISTICS:
            getattr(layer, name).copy_(CASES["batch_norm, 2d"].tensors[name])
    return layer


KINDS = {"torch": lambda: layer_of(nn.BatchNorm2d)}
if has("timm"):
    from timm.layers import BatchNormAct2d

    KINDS |= {
        "timm": lambda: layer_of(BatchNormAct2d, act_layer=nn.SiLU),
        "timm, no activation": lambda: layer_of(BatchNormAct2d, apply_act=False),
    }


@pytest.fixture(name="layer")
def _layer():
    return layer_of(nn.BatchNorm2d)


@pytest.fixture(name="x")
def _x():
    return torch.randn(SHAPE, requires_grad=True)


def bytes_and_output(model, x):
    with SavedBytes(model) as saved:
        y = model(x)
    return saved.num_bytes, y


def results(model, x):
    """Output, gradients and buffers."""
    given = x.detach().clone().requires_grad_()
    y = model(given)
    y.float().square().sum().backward()
    return [y, given.grad, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_strides_and_second_derivatives_are_torchs(memory_format):
    case = CASES["batch_norm, 2d"]
    known = [case.tensors[name] for name in STATISTICS]
    x = case.tensors["x"].clone(memory_format=memory_format).requires_grad_()
    assert frozen_batch_norm(x, *known).stride() == F.batch_norm(x, *known).stride()
    assert torch.autograd.gradgradcheck(lambda x: frozen_batch_norm(x, *known), (x,))


@pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)
def test_layers_keep_nothing_of_their_own(build, x):
    layer = build()
    before, expected = bytes_and_output(layer, x)
    (want,) = torch.autograd.grad(expected.square().sum(), x)
    model = nn.Sequential(layer)
    for _ in range(2):
        assert lean.enable(model, "require").made == {"batch_norm": ["0"]}
    after, y = bytes_and_output(layer, x)
    (gx,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(y, expected)
    torch.testing.assert_close(gx, want, rtol=1e-5, atol=1e-6)
    assert before - after == x.numel() * 4
    lean.disable(model)
    assert bytes_and_output(layer, x)[0] == before
    assert type(layer) is type(build())


def train(layer):
    layer.train()


def train_weight(layer):
    layer.weight.requires_grad_()


def forget_statistics(layer):
    """It normalises by the batch then, in any mode."""
    layer.running_mean = layer.running_var = None


@pytest.mark.parametrize("change", [train, train_weight, forget_statistics])
def test_what_is_not_frozen_is_left_alone(change, layer, x):
    change(layer)
    twin = copy.deepcopy(layer)
    lean.enable(twin)
    for theirs, ours in zip(results(layer, x), results(twin, x), strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


def test_other_forwards_and_trained_layers_are_left_alone():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    hooked = layer_of(nn.BatchNorm2d)
    hooked.forward = lambda x: x
    others = [layer_of(Own), hooked, nn.LayerNorm(6), nn.BatchNorm2d(6).eval()]
    model = nn.Sequential(layer_of(nn.BatchNorm2d), *others)
    for _ in range(2):
        assert lean.enable(model).made == {"batch_norm": ["0"]}
    lean.disable(model)
    assert "forward" in hooked.__dict__


def test_a_layer_that_is_frozen_later(x):
    layer = nn.BatchNorm2d(6).eval()
    assert lean.enable(layer).made == {}
    assert bytes_and_output(layer, x)[0] > 0
    layer.requires_grad_(requires_grad=False)
    assert bytes_and_output(layer, x)[0] == 0
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(torch.randn(2, 6, requires_grad=True))
    gradient = torch.func.vmap(torch.func.grad(lambda x: layer(x[None]).square().sum()))
    ours = gradient(x.detach())
    lean.disable(layer)
    assert torch.equal(ours, gradient(x.detach()))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@needs("timm")
def test_compiled(x):
    torch._dynamo.reset()
    layer = layer_of(BatchNormAct2d, act_layer=nn.SiLU)
    (want,) = torch.autograd.grad(layer(x).square().sum(), x)
    lean.enable(layer)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], want)
