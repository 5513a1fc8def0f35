"""What the graph of any operation leaves out, and what it refuses."""

from functools import partial

import pytest
import torch

from pacatune.ops import paca_conv, paca_experts_linear, paca_linear, paca_linear_additive
from tests.ops import test_convolution, test_experts, test_gated, test_linear, test_quantized, twin


def build(name):
    if name == "gated":
        return test_gated.together, test_gated.make((2,))
    if name == "quantised":
        return test_quantized.ours(test_quantized.Codes()), test_quantized.make(4)
    if name == "convolution":
        tensors, options = test_convolution.make("2d")
        return partial(twin.by_parts(paca_conv), scaling=1.0, **options), tensors
    if name == "experts":
        return partial(twin.by_parts(paca_experts_linear), scaling=1.0), test_experts.make()
    function = {"linear": paca_linear, "additive": paca_linear_additive}[name]
    return partial(twin.by_parts(function), scaling=1.0), test_linear.make((5,))


OPERATIONS = ["linear", "additive", "convolution", "experts"]


@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_is_kept_for_a_gradient_that_nobody_needs(name):
    """Where delta is frozen, its columns of x are not."""
    function, tensors = build(name)
    leaves = twin.leaves_of(tensors, {"x"})
    assert twin.bytes_kept(lambda: function(**leaves), leaves.values()) == 0


@pytest.mark.parametrize("name", [*OPERATIONS, "gated", "quantised"])
def test_a_second_derivative_is_refused(name):
    function, tensors = build(name)
    leaves = twin.leaves_of(tensors, {"x", "gate"})
    (x,) = (leaf for leaf in leaves.values() if leaf is not None and leaf.requires_grad)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(function(**leaves).sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("name", "changed"), [*((name, "delta") for name in OPERATIONS), ("experts", "weight")]
)
def test_a_change_in_place_before_backward_is_refused(name, changed):
    function, tensors = build(name)
    leaves = twin.leaves_of(tensors, {"x", "delta"})
    y = function(**leaves)
    with torch.no_grad():
        leaves[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
