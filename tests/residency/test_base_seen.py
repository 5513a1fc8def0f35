"""R2: whoever looks at the base, or holds it, sees the base, bit for bit."""

import gc
import warnings
import weakref

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from pacatune.residency.watching import WeightParameter
from tests.residency import net
from tests.residency.looks import COPIED, LOOKS, assert_sees_base


@pytest.mark.parametrize("look", [name for name in LOOKS if name not in COPIED])
def test_held(look, base, model, x):
    """Over optimiser steps, without adapters, and in evaluation."""
    held = LOOKS[look](model)
    optimizer = torch.optim.SGD(net.deltas(model), lr=0.1)
    for _ in range(3):
        model(x).sum().backward()
        optimizer.step()
        assert_sees_base(base, held)
    model(x)
    with model.disable_adapter():
        assert_sees_base(base, held)
        assert torch.equal(model(x), base(x))
    net.check_evaluation(base, model, x)
    assert_sees_base(base, held)
    weight = held["base_model.model.first.base_layer.weight"].detach()
    assert torch.equal(load(save({"w": weight}))["w"], base.first.weight)


def multiply(held: nn.Parameter) -> None:
    with torch.no_grad():
        held.mul_(2)


def swap(held: nn.Parameter) -> None:
    torch.utils.swap_tensors(held, nn.Parameter(torch.randn_like(held), requires_grad=False))


@pytest.mark.parametrize("then", [nn.Module.__call__, lambda model, x: model.state_dict()])
@pytest.mark.parametrize("change", [multiply, swap])
def test_changing_a_held_weight_while_columns_are_in_it_is_refused(change, then, model, x):
    held = net.layers(model)[0].base_layer.weight
    model(x)
    change(held)
    with pytest.raises(RuntimeError, match=r"changed in place .* through its module"):
        then(model, x)


def test_a_held_weight_that_is_trained_from_now_on(model, x):
    """With columns in it, and without a look at it (R5)."""
    first, second = net.layers(model)
    weight = second.base_layer.weight
    hidden = torch.tanh(first(x)).detach()
    second(hidden)
    assert second.residency.is_written
    weight.requires_grad_()
    second(hidden).sum().backward()
    torch.testing.assert_close(weight.grad, hidden.sum(0).expand_as(weight))


def test_a_held_weight_changed_for_an_evaluation(base, model, x):
    weight = net.layers(model)[0].base_layer.weight
    with torch.no_grad():
        kept = weight.clone()
        weight.mul_(1.01)
        model(x)
        weight.copy_(kept)
    del weight
    net.check(base, model, x)
    net.assert_base(base, model)


def test_changed_through_the_data_of_a_held_parameter(base, model, x):
    """As averages and home-made optimisers do; taking `.data` is a look."""
    held = [layer.base_layer.weight for layer in net.layers(model)]
    plain = [base.first.weight, base.second.weight]
    for _ in range(3):
        net.check(base, model, x)
        assert type(held[0]) is WeightParameter
        for ours, theirs in zip(held, plain, strict=True):
            ours.data.mul_(0.9)
            theirs.data.mul_(0.9)
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(held, plain, strict=True):
        value = torch.randn_like(ours)
        ours.data, theirs.data = value, value.clone()
    net.check(base, model, x)
    net.assert_base(base, model)


def test_a_layer_is_freed_without_the_garbage_collector(base, model, x):
    model(x).sum().backward()
    layer = net.layers(model)[0]
    inner, alive = layer.base_layer, weakref.ref(layer.residency)
    gc.disable()
    try:
        model.base_model.model.first = nn.Identity()
        del layer
        assert alive() is None
        assert torch.equal(inner.weight, base.first.weight)
        alive = weakref.ref(inner)
        del inner
        assert alive() is None
    finally:
        gc.enable()


def test_a_layer_is_freed_within_a_transform(base, model, x):
    """As the garbage collector may do at any time."""
    model(x).sum().backward()
    weight = net.layers(model)[0].base_layer._parameters
    weight = dict.get(weight, "weight")

    def free(number):
        model.base_model.model.first = nn.Identity()
        return number.square()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.func.grad(free)(torch.tensor(1.0))
    assert torch.equal(weight, base.first.weight)
