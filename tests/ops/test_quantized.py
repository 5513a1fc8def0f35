"""The quantised form against plain autograd on the dequantised weight."""

import pytest
import torch
from torch.nn import functional as F

from pacatune.ops import paca_quantized_linear
from pacatune.ops.columns import Update
from tests.ops import reference, twin
from tests.ops.twin import choose, normal

OUT, IN, RANK = 6, 10, 3
own_kernel = pytest.mark.parametrize("own_kernel", [True, False])


class Codes:
    """A weight in 256 levels; counts how often it is dequantised."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.codes = torch.randint(-128, 128, (OUT, IN), generator=generator, dtype=torch.int8)
        self.count = 0

    def __call__(self, dtype):
        self.count += 1
        return self.codes.to(dtype) / 64


def make(*leading, dtype=torch.float64, bias=True):
    return {
        "x": normal(*leading, IN, dtype=dtype),
        "delta": normal(OUT, RANK, dtype=dtype, seed=2),
        "bias": normal(OUT, dtype=dtype, seed=3) if bias else None,
    }


def ours(weight, own_kernel=False):
    """The form on a weight, perhaps with a kernel that multiplies, and adds the bias, by itself."""

    def function(x, delta, bias):
        multiply = (lambda x: F.linear(x, weight(x.dtype), bias)) if own_kernel else None
        return paca_quantized_linear(
            x, Update(delta, choose(IN, RANK), 0.7), weight, bias, multiply
        )

    return function


def theirs(weight):
    how = {"indices": choose(IN, RANK), "scaling": 0.7}
    return lambda x, delta, bias: reference.paca_linear(x, weight(x.dtype), delta, bias=bias, **how)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
def test_gradcheck(shape, bias):
    leaves = twin.leaves_of(make(*shape, bias=bias), {"x", "delta", "bias"})
    assert torch.autograd.gradcheck(ours(Codes()), tuple(leaves.values()))


@own_kernel
def test_equals_the_reference_with_any_frozen_inputs(own_kernel):
    tensors, weight = make(2, 3), Codes()
    for trained in twin.subsets(tensors):
        both = ours(weight, own_kernel), theirs(weight)
        twin.assert_equal(*(twin.gradients(one, tensors, trained) for one in both))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_the_dtype(dtype):
    tensors, weight = make(64, dtype=dtype), Codes()
    tensors["delta"] = tensors["delta"].float()
    twin.assert_error_of_plain(ours(weight), theirs(weight), tensors, set(tensors))


@own_kernel
def test_keeps_the_chosen_channels_and_dequantises_once_each_way(own_kernel):
    weight, leaves = Codes(), twin.leaves_of(make(5, 4), {"x", "delta", "bias"})
    y = []
    call = ours(weight, own_kernel)
    kept = twin.bytes_kept(lambda: y.append(call(**leaves)), leaves.values())
    assert kept == 20 * RANK * 8 + RANK * 8
    assert weight.count == 1
    y[0].sum().backward()
    assert weight.count == 2


@own_kernel
def test_autocast_computes_as_it_does_for_a_linear_layer(own_kernel):
    weight, tensors = Codes(), make(2, 3, dtype=torch.float32, bias=False)
    multiplied = ours(weight, own_kernel)
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = (
            twin.gradients(one, tensors, {"x", "delta"}) for one in (multiplied, theirs(weight))
        )
    assert found["y"].dtype == torch.bfloat16
    twin.assert_equal(found, plain, 0.1)
