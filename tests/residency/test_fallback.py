"""R5: what must not be written is not written, and the numbers stay right."""

from collections.abc import Callable

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from pacatune.tuner.model import mark_shared_weights
from tests.residency.net import adapt, add_other, check, check_evaluation, layers


def hook(model: nn.Module) -> None:
    for layer in layers(model):
        layer.base_layer.register_forward_hook(lambda *call: None)


def flatten(model: nn.Module) -> None:
    """As FSDP1 does: each weight is a view of a flat parameter."""
    inner = [layer.base_layer for layer in layers(model)]
    flat = torch.cat([module.weight.detach().reshape(-1) for module in inner])
    parts = flat.split([module.weight.numel() for module in inner])
    for module, part in zip(inner, parts, strict=True):
        module.weight = nn.Parameter(part.view_as(module.weight), requires_grad=False)


def activate_two(model: nn.Module) -> None:
    add_other(model)
    model.base_model.set_adapter(["default", "other"])


NOT_WRITTEN: dict[str, Callable[[nn.Module], None]] = {
    "hooks on the base layer": hook,
    "one flat buffer": flatten,
    "two active adapters": activate_two,
}


@pytest.mark.parametrize("change", NOT_WRITTEN.values(), ids=NOT_WRITTEN)
def test_not_written(change, base, model, x, writes):
    change(model)
    check(base, model, x)
    assert not writes


def test_accelerate_offload(base, model, x, writes):
    for layer in layers(model):
        hook = AlignDevicesHook(execution_device="cpu", offload=True)
        add_hook_to_module(layer.base_layer, hook)
        assert layer.base_layer.weight.is_meta
    check_evaluation(base, model, x)
    assert not writes


def test_a_base_weight_that_is_trained(base, model, x, writes):
    """Asked for a gradient while it is held and has columns in it."""
    layer = layers(model)[1]
    weight = layer.base_layer.weight
    model(x)
    weight.requires_grad_()
    check(base, model, x)  # takes them out
    writes.clear()
    check(base, model, x)
    assert weight.data_ptr() not in writes
    hidden = torch.tanh(layers(model)[0](x)).detach()
    weight.grad = None
    layer(hidden).sum().backward()
    torch.testing.assert_close(weight.grad, hidden.sum(0).expand_as(weight))


@pytest.mark.parametrize("tied_before", [True, False])
def test_tied_weights(tied_before, base, x, writes):
    base.other = nn.Linear(10, 12)
    if tied_before:
        base.other.weight = base.first.weight
    model = adapt(base)
    layer, other = layers(model)[0], model.base_model.model.other
    if not tied_before:
        model(x)
        assert layer.residency.is_written
        dict.__setitem__(other._parameters, "weight", layer.residency.weight)  # without a look
        mark_shared_weights(model.base_model.model)
    address = other.weight.data_ptr()
    writes.clear()
    for _ in range(2):
        assert torch.equal(other.weight, base.first.weight)
        check(base, model, x)
    assert address not in writes
    model.merge_adapter()
    assert torch.equal(other.weight, base.first.weight)
    model.unmerge_adapter()
    assert layer.base_layer.weight is other.weight


def test_replicas_of_data_parallel_do_not_write_the_original(base, model, x, writes):
    layer = layers(model)[0]
    layer(x)
    writes.clear()
    replica = layer._replicate_for_data_parallel()
    inner = layer.base_layer._replicate_for_data_parallel()
    inner.weight, inner.bias = base.first.weight.detach().clone(), base.first.bias
    replica._modules["base_layer"] = inner
    torch.testing.assert_close(replica(x), layer(x))
    assert not [w for w in writes if w != layer.base_layer.weight.data_ptr()]
