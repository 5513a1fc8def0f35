"""BatchNorm that keeps nothing: equal to torch's in all it computes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pacatune import lean
from pacatune.lean.batch_norm import frozen_batch_norm
from tests.releases import has, needs

SHAPES = {1: (4, 6), 2: (4, 6, 5), 3: (4, 6, 5, 3), 4: (2, 6, 3, 4, 2)}


def statistics(dtype=torch.float64, affine=True):
    generator = torch.Generator().manual_seed(0)
    mean, weight, bias = (torch.randn(6, generator=generator).to(dtype) for _ in range(3))
    var = torch.rand(6, generator=generator).to(dtype) + 0.1
    return (mean, var, weight, bias) if affine else (mean, var, None, None)


def layer_of(kind, **options):
    """A frozen layer in evaluation mode whose statistics and affine map are not the identity."""
    layer = kind(6, **options).requires_grad_(False).eval()
    with torch.no_grad():
        for tensor, value in zip(
            (layer.running_mean, layer.running_var, layer.weight, layer.bias),
            statistics(torch.float32),
            strict=True,
        ):
            tensor.copy_(value)
    return layer


KINDS = {
    "1d": (lambda: layer_of(nn.BatchNorm1d), (4, 6, 5)),
    "2d": (lambda: layer_of(nn.BatchNorm2d), (4, 6, 5, 3)),
    "3d": (lambda: layer_of(nn.BatchNorm3d), (2, 6, 3, 4, 2)),
}
if has("timm"):
    from timm.layers import BatchNormAct2d

    KINDS |= {
        "timm": (lambda: layer_of(BatchNormAct2d, act_layer=nn.SiLU), (4, 6, 5, 3)),
        "timm, no activation": (lambda: layer_of(BatchNormAct2d, apply_act=False), (4, 6, 5, 3)),
    }


def kept_bytes(run, *held):
    """Bytes of storages that autograd keeps, but for those held anyway."""
    given, kept = {tensor.untyped_storage().data_ptr() for tensor in held}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    return sum(kept.values()), y


@pytest.mark.parametrize("ndim", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_gradcheck(ndim, affine):
    x = torch.randn(SHAPES[ndim], dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck, torch.autograd.gradgradcheck
    for test in check:
        assert test(lambda x: frozen_batch_norm(x, *statistics(affine=affine)), (x,))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_torchs_and_keeps_nothing(memory_format):
    x = torch.randn(4, 6, 5, 3).to(memory_format=memory_format).requires_grad_()
    gy = torch.randn(4, 6, 5, 3).to(memory_format=memory_format)
    known = statistics(torch.float32)
    theirs, expected = kept_bytes(lambda: F.batch_norm(x, *known), *known)
    ours, y = kept_bytes(lambda: frozen_batch_norm(x, *known), *known)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    (gx,), (want,) = (torch.autograd.grad(out, x, gy) for out in (y, expected))
    torch.testing.assert_close(gx, want, rtol=1e-6, atol=1e-7)
    assert (ours, theirs) == (0, x.numel() * 4)


@pytest.mark.parametrize("norm_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_is_no_worse_than_torchs(norm_dtype):
    x, gy = torch.randn(64, 6, 7, 7), torch.randn(64, 6, 7, 7)
    exact = [t.double() for t in (x.bfloat16(), gy.bfloat16(), *statistics(torch.float32))]
    known = [t.to(norm_dtype) for t in statistics(torch.float32)]
    exact[2:] = [t.double() for t in known]
    errors = {}
    for name, function in (("torch", F.batch_norm), ("ours", frozen_batch_norm)):
        x16 = x.bfloat16().requires_grad_()
        y = function(x16, *known)
        (gx,) = torch.autograd.grad(y, x16, gy.bfloat16())
        assert y.dtype == gx.dtype == torch.bfloat16
        xd = exact[0].clone().requires_grad_()
        yd = F.batch_norm(xd, *exact[2:])
        (gxd,) = torch.autograd.grad(yd, xd, exact[1])
        errors[name] = (y - yd).abs().mean().item(), (gx - gxd).abs().mean().item()
    for ours, theirs in zip(errors["ours"], errors["torch"], strict=True):
        assert ours <= theirs * 1.01


def test_trained_parameters_are_refused():
    x = torch.randn(2, 6)
    mean, var, weight, bias = statistics(torch.float32)
    for name in ("weight", "bias"):
        given = {"weight": weight.clone(), "bias": bias.clone()}
        given[name].requires_grad_()
        with pytest.raises(ValueError, match=f"`{name}` asks for a gradient, but is frozen here"):
            frozen_batch_norm(x, mean, var, **given)


@pytest.mark.parametrize("name", KINDS)
def test_layers_keep_nothing_of_their_own(name):
    build, shape = KINDS[name]
    layer = build()
    x = torch.randn(shape, requires_grad=True)
    held = [*layer.parameters(), *layer.buffers()]
    before, expected = kept_bytes(lambda: layer(x), *held)
    (want,) = torch.autograd.grad(expected.square().sum(), x)
    model = nn.Sequential(layer)
    assert lean.enable(model).made == {"batch_norm": ["0"]}
    after, y = kept_bytes(lambda: layer(x), *held)
    (gx,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(y, expected)
    torch.testing.assert_close(gx, want, rtol=1e-5, atol=1e-6)
    assert before - after == x.numel() * 4
    lean.disable(model)
    assert kept_bytes(lambda: layer(x), *held)[0] == before
    assert type(layer) is type(build())


def test_training_is_left_alone():
    for change in (
        lambda layer: layer.train(),
        lambda layer: layer.weight.requires_grad_(),
        lambda layer: layer.bias.requires_grad_(),
    ):
        plain = layer_of(nn.BatchNorm2d)
        change(plain)
        twin = copy.deepcopy(plain)
        lean.enable(twin)
        x = torch.randn(4, 6, 5, 3)
        results = []
        for layer in (plain, twin):
            given = x.clone().requires_grad_()
            y = layer(given)
            y.square().sum().backward()
            results.append([y, given.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
        for theirs, ours in zip(*results, strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)
    unknown = layer_of(nn.BatchNorm2d, track_running_stats=True)
    unknown.running_mean = unknown.running_var = None  # normalises by the batch in any mode
    x = torch.randn(4, 6, 5, 3)
    expected = unknown(x)
    lean.enable(unknown)
    assert torch.equal(unknown(x), expected)


def test_wrong_input_is_refused_as_before():
    layer = layer_of(nn.BatchNorm2d)
    lean.enable(layer)
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(torch.randn(2, 6, requires_grad=True))


def test_enable_makes_frozen_layers_lean_and_counts_them():
    model = nn.Sequential(nn.Conv2d(6, 6, 1), layer_of(nn.BatchNorm2d), nn.BatchNorm2d(6).eval())
    x = torch.randn(2, 6, 5, 3, requires_grad=True)
    before, expected = kept_bytes(lambda: model(x), x, *model.parameters(), *model.buffers())
    for _ in range(2):
        assert lean.enable(model, "require").made == {"batch_norm": ["1"]}
    after, y = kept_bytes(lambda: model(x), x, *model.parameters(), *model.buffers())
    assert torch.equal(y, expected)
    assert before - after == x.numel() * 4
    lean.disable(model)
    assert kept_bytes(lambda: model(x), x, *model.parameters(), *model.buffers())[0] == before


def test_other_forwards_are_left_alone():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    hooked = layer_of(nn.BatchNorm2d)
    hooked.forward = lambda x: x
    model = nn.Sequential(layer_of(Own), hooked, nn.LayerNorm(6), layer_of(nn.BatchNorm2d))
    for _ in range(2):
        assert lean.enable(model).made == {"batch_norm": ["3"]}
    lean.disable(model)
    assert "forward" in hooked.__dict__


def test_copies_and_pickles_are_plain():
    layer = layer_of(nn.BatchNorm2d)
    x = torch.randn(4, 6, 5, 3, requires_grad=True)
    expected = layer(x)
    lean.enable(layer)
    others = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    with torch.no_grad():
        layer.weight.mul_(2)
    assert not torch.equal(layer(x), expected)
    for other in others:  # each reads its own weight
        held = [*other.parameters(), *other.buffers()]
        assert type(other) is nn.BatchNorm2d
        assert torch.equal(other(x), expected)
        assert kept_bytes(lambda other=other: other(x), *held)[0] > 0
        assert lean.enable(other).made == {"batch_norm": [""]}
        assert torch.equal(other(x), expected)
        assert kept_bytes(lambda other=other: other(x), *held)[0] == 0


def test_a_layer_that_is_frozen_later():
    layer = nn.BatchNorm2d(6).eval()
    x = torch.randn(4, 6, 5, 3, requires_grad=True)
    held = [*layer.parameters(), *layer.buffers()]
    assert lean.enable(layer).made == {}
    assert kept_bytes(lambda: layer(x), *held)[0] > 0
    layer.requires_grad_(requires_grad=False)
    assert kept_bytes(lambda: layer(x), *held)[0] == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_and_autocast(use_reentrant):
    plain = nn.Sequential(nn.Conv2d(3, 6, 1), layer_of(nn.BatchNorm2d), nn.SiLU())
    twin = copy.deepcopy(plain)
    lean.enable(twin)
    x = torch.randn(2, 3, 4, 4)
    gradients = []
    for model in (plain, twin):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = checkpoint(model, given, use_reentrant=use_reentrant)
        y.float().square().sum().backward()
        gradients.append([y, given.grad, model[0].weight.grad])
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_transforms():
    layer, x = layer_of(nn.BatchNorm2d), torch.randn(4, 6, 5, 3)

    def loss(x):
        return layer(x[None]).square().sum()

    expected = torch.func.vmap(torch.func.grad(loss))(x)
    lean.enable(layer)
    assert torch.equal(torch.func.vmap(torch.func.grad(loss))(x), expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@needs("timm")
def test_compiled():
    torch._dynamo.reset()
    layer = layer_of(BatchNormAct2d, act_layer=nn.SiLU)
    x = torch.randn(4, 6, 5, 3, requires_grad=True)
    (want,) = torch.autograd.grad(layer(x).square().sum(), x)
    lean.enable(layer)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], want)
