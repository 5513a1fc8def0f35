"""R5: what must not be written is not written, and the numbers stay right."""

import pytest
import torch
from torch import nn

from pacatune.tuner.model import mark_shared_weights
from tests.residency.net import adapt, check, layers


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
