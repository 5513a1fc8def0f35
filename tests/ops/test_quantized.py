"""The quantised form against plain autograd on the dequantised weight."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pacatune.ops import paca_quantized_linear, reference

OUT, IN, RANK = 7, 10, 3
INDICES = torch.tensor([1, 4, 9])


class Codes:
    """A weight in 256 levels; counts how often it is dequantised."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.codes = torch.randint(-128, 128, (OUT, IN), generator=generator, dtype=torch.int8)
        self.count = 0

    def __call__(self, dtype):
        self.count += 1
        return self.codes.to(dtype) / 64


def inputs(*shape, dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, IN, generator=generator, dtype=torch.float64).to(dtype)
    delta = torch.randn(OUT, RANK, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(OUT, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    return [t if t is None else t.requires_grad_() for t in (x, delta, b)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
def test_gradcheck(shape, bias):
    weight = Codes()
    x, delta, b = inputs(*shape, bias=bias)
    assert torch.autograd.gradcheck(
        lambda x, delta, *b: paca_quantized_linear(x, delta, INDICES, 0.7, weight, *b),
        (x, delta) if b is None else (x, delta, b),
    )


@pytest.mark.parametrize("frozen", list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("own_kernel", [True, False])
def test_equals_the_reference_with_any_frozen_inputs(frozen, own_kernel):
    weight = Codes()
    multiply = (lambda x: F.linear(x, weight(x.dtype), theirs[2])) if own_kernel else None
    ours, theirs = inputs(2, 3), inputs(2, 3)
    for tensors in (ours, theirs):
        for tensor, is_frozen in zip(tensors, frozen, strict=True):
            tensor.requires_grad_(not is_frozen)
    x, delta, bias = ours
    y = paca_quantized_linear(x, delta, INDICES, 0.7, weight, bias, multiply)
    expected = reference.paca_linear(
        theirs[0], weight(torch.float64), theirs[1], INDICES, 0.7, theirs[2]
    )
    torch.testing.assert_close(y, expected)
    if all(frozen):
        assert not y.requires_grad
        return
    y.square().sum().backward()
    expected.square().sum().backward()
    for tensor, other in zip(ours, theirs, strict=True):
        assert (tensor.grad is None) == (other.grad is None)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_the_dtype(dtype):
    """Against float64 no worse than plain autograd in the same dtype."""
    weight = Codes()
    exact, plain, ours = inputs(64), inputs(64, dtype=dtype), inputs(64, dtype=dtype)
    plain[1], ours[1] = (d.detach().float().requires_grad_() for d in (plain[1], ours[1]))
    for tensors in (exact, plain):
        w = weight(tensors[0].dtype)
        reference.paca_linear(tensors[0], w, tensors[1], INDICES, 0.7, tensors[2]).sum().backward()
    x, delta, bias = ours
    paca_quantized_linear(x, delta, INDICES, 0.7, weight, bias).sum().backward()
    assert delta.grad.dtype == torch.float32
    for tensor, other, true in zip(ours, plain, exact, strict=True):
        error = (tensor.grad.double() - true.grad).abs().max()
        budget = (other.grad.double() - true.grad).abs().max()
        assert error <= 1.5 * budget + torch.finfo(dtype).eps * true.grad.abs().max()


@pytest.mark.parametrize("own_kernel", [True, False])
def test_keeps_the_chosen_channels_and_dequantises_once_each_way(own_kernel):
    weight = Codes()
    x, delta, bias = inputs(5, 4)
    multiply = (lambda x: F.linear(x, torch.zeros(OUT, IN).double())) if own_kernel else None
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = paca_quantized_linear(x, delta, INDICES, 0.7, weight, bias, multiply)
    assert weight.count == (0 if own_kernel else 1)
    kept = [t for t in saved if t is not delta and t is not INDICES]
    assert sum(t.numel() * t.itemsize for t in kept) == 20 * RANK * 8
    y.sum().backward()
    assert weight.count == (1 if own_kernel else 2)


def test_no_second_derivative():
    x, delta, bias = inputs(4)
    y = paca_quantized_linear(x, delta, INDICES, 0.7, Codes(), bias)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_in_a_module_with_checkpointing():
    weight = Codes()
    layer = nn.Module()
    layer.delta = nn.Parameter(inputs()[1].detach())
    x = inputs(3)[0].detach().requires_grad_()

    def run(x):
        return paca_quantized_linear(x, layer.delta, INDICES, 0.7, weight).square()

    run(x).sum().backward()
    expected = x.grad.clone(), layer.delta.grad.clone()
    x.grad = layer.delta.grad = None
    torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close((x.grad, layer.delta.grad), expected)


@pytest.mark.parametrize("own_kernel", [True, False])
def test_autocast_computes_as_it_does_for_a_linear_layer(own_kernel):
    weight = Codes()
    multiply = (lambda x: F.linear(x, weight(x.dtype)).float()) if own_kernel else None
    ours = inputs(2, 3, dtype=torch.float32, bias=False)
    theirs = inputs(2, 3, dtype=torch.float32, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        y = paca_quantized_linear(*ours[:2], INDICES, 0.7, weight, None, multiply)
        plain = reference.paca_linear(theirs[0], weight(torch.float32), theirs[1], INDICES, 0.7)
    assert y.dtype == (torch.float32 if own_kernel else torch.bfloat16)
    torch.testing.assert_close(y.float(), plain.float(), rtol=2e-2, atol=2e-2)
    y.float().square().sum().backward()
    plain.float().square().sum().backward()
    for tensor, expected in zip(ours[:2], theirs[:2], strict=True):
        assert tensor.grad.dtype == torch.float32
        torch.testing.assert_close(tensor.grad, expected.grad, rtol=5e-2, atol=0.5)
