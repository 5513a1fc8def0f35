"""A gated product and the PaCA layer after it in one Function, against the two apart."""

from functools import partial

import pytest
import torch

from pacatune.lean.gated import ACTIVATIONS
from pacatune.ops.linear import Call, apply_paca_linear
from tests.ops import reference, twin
from tests.ops.twin import choose, normal

WIDTH, OUT, RANK = 11, 6, 3
SCALING = 0.5


def make(leading, dtype=torch.float64, bias=True):
    return {
        "gate": normal(*leading, WIDTH, dtype=dtype),
        "up": normal(*leading, WIDTH, dtype=dtype, seed=5),
        "delta": normal(OUT, RANK, dtype=dtype, seed=2),
        "bias": normal(OUT, dtype=dtype, seed=3) if bias else None,
    }


def fixed(dtype):
    return normal(OUT, WIDTH, dtype=dtype, seed=1), choose(WIDTH, RANK)


def apart(gate, up, delta, bias, activation="silu", weight=None):
    own, indices = fixed(gate.dtype)
    h = ACTIVATIONS[activation].value(gate) * up
    weight = own if weight is None else weight
    return reference.paca_linear(h, weight, delta, indices, SCALING, bias)


def together(gate, up, delta, bias, activation="silu", is_resident=True):
    weight, indices = fixed(gate.dtype)
    if is_resident:
        weight = reference.adapted_weight(weight, delta.detach(), indices, SCALING)
    call = Call(SCALING, ACTIVATIONS[activation])
    return apply_paca_linear(up, delta, None, indices, bias, gate, call, weight, is_resident)


@pytest.mark.parametrize("is_resident", [True, False])
@pytest.mark.parametrize(
    ("activation", "leading", "dtype"),
    [
        *((activation, (2, 3), torch.bfloat16) for activation in ACTIVATIONS),
        *(("silu", leading, torch.float64) for leading in [(), (5,), (2, 3), (0,)]),
    ],
)
def test_equals_apart(is_resident, activation, leading, dtype):
    tensors, trained = make(leading, dtype), {"gate", "up", "delta", "bias"}
    options = {"activation": activation}
    ours = twin.gradients(partial(together, **options, is_resident=is_resident), tensors, trained)
    theirs = twin.gradients(partial(apart, **options), tensors, trained)
    if dtype == torch.float64:
        twin.assert_equal(ours, theirs)
        return
    weight, wide = fixed(dtype)[0].double(), twin.cast(tensors, torch.float64)
    exact = twin.gradients(partial(apart, **options, weight=weight), wide, trained)
    twin.assert_within_own_error(ours, theirs, exact, factor=2.5)


@pytest.mark.parametrize("trained", [{"delta"}, {"gate"}, {"up", "bias"}, {"gate", "up"}])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_resident", [True, False])
def test_frozen_inputs(trained, bias, is_resident):
    tensors = make((2, 3), bias=bias)
    trained = {name for name in trained if tensors[name] is not None}
    both = partial(together, is_resident=is_resident), apart
    twin.assert_equal(*(twin.gradients(one, tensors, trained) for one in both))


def test_bytes_kept():
    tensors = make((40,), torch.bfloat16, bias=False)
    weight, indices = fixed(torch.bfloat16)
    leaves = twin.leaves_of(tensors, {"gate", "up", "delta"})
    kept = twin.bytes_kept(lambda: together(**leaves, is_resident=False), [])
    parameters = weight.nbytes + indices.nbytes + tensors["delta"].nbytes
    assert kept == 2 * 40 * WIDTH * 2 + parameters
