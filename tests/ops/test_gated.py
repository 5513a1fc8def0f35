"""A gated product and the PaCA layer after it in one Function, against the two apart."""

import pytest
import torch
from torch.nn import functional as F

from pacatune.lean import ACTIVATIONS
from pacatune.ops import reference
from pacatune.ops.linear import apply_paca_linear
from tests.lean.twins import assert_within_own_error, run

WIDTH, OUT, RANK = 11, 7, 3
SCALING = 0.5


def make(leading, dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "gate": normal(*leading, WIDTH),
        "up": normal(*leading, WIDTH),
        "delta": normal(OUT, RANK),
        "bias": normal(OUT) if bias else None,
    }


def fixed(dtype):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(OUT, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return weight, torch.tensor([1, 4, 9])


def apart(gate, up, delta, bias, activation="silu"):
    weight, indices = fixed(gate.dtype)
    h = ACTIVATIONS[activation].value(gate) * up
    return reference.paca_linear(h, weight, delta, indices, SCALING, bias)


def together(gate, up, delta, bias, activation="silu", is_resident=True):
    weight, indices = fixed(gate.dtype)
    if is_resident:
        weight = reference.adapted_weight(weight, delta.detach(), indices, SCALING)
    return apply_paca_linear(
        up, weight, delta, indices, SCALING, bias, is_resident, None, ACTIVATIONS[activation], gate
    )


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
    ours, _ = run(lambda **x: together(**x, **options, is_resident=is_resident), tensors, trained)
    theirs, _ = run(lambda **x: apart(**x, **options), tensors, trained)
    wide = {name: x.double() for name, x in tensors.items()}
    weight, _ = fixed(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(__name__ + ".fixed", lambda _: (weight.double(), fixed_indices))
        exact, _ = run(lambda **x: apart(**x, **options), wide, trained)
    assert_within_own_error(ours, theirs, exact, factor=2.5)


fixed_indices = fixed(torch.float64)[1]


@pytest.mark.parametrize("trained", [{"delta"}, {"gate"}, {"up", "bias"}, {"gate", "up"}])
@pytest.mark.parametrize("bias", [True, False])
def test_frozen_inputs(trained, bias):
    tensors = make((2, 3), bias=bias)
    trained = {name for name in trained if tensors[name] is not None}
    ours, _ = run(together, tensors, trained)
    theirs, _ = run(apart, tensors, trained)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected)


def test_bytes_kept():
    tensors = make((40,), torch.bfloat16, bias=False)
    weight, indices = fixed(torch.bfloat16)
    _, ours = run(
        lambda gate, up, delta, bias: apply_paca_linear(
            up, weight, delta, indices, SCALING, bias, True, None, ACTIVATIONS["silu"], gate
        ),
        tensors,
        {"gate", "up", "delta"},
    )
    parameters = weight.nbytes + indices.nbytes + tensors["delta"].nbytes
    assert ours == 2 * 40 * WIDTH * 2 + parameters


def test_no_second_derivative():
    tensors = make((2,))
    gate = tensors["gate"].requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(together(**tensors).sum(), gate, create_graph=True)


class Elsewhere:
    """Where the columns are not in the weight any more."""

    def __init__(self, weight):
        self.weight = weight

    def backward(self, compute):
        return compute(self.weight, False)


def test_asks_again_before_it_reads_the_weight():
    """Columns that left the weight in between are added in the backward pass."""
    tensors = make((4,))
    weight, indices = fixed(torch.float64)
    memory = weight.clone()
    leaves = {n: x.clone().requires_grad_() for n, x in tensors.items()}
    adapted = reference.adapted_weight(weight, tensors["delta"], indices, SCALING)
    memory.data.copy_(adapted)
    y = apply_paca_linear(
        leaves["up"], memory, leaves["delta"], indices, SCALING, leaves["bias"],
        True, Elsewhere(memory), ACTIVATIONS["silu"], leaves["gate"],
    )  # fmt: skip
    memory.data.copy_(weight)
    y.sum().backward()
    twin = {n: x.clone().requires_grad_() for n, x in tensors.items()}
    apart(**twin).sum().backward()
    for name in twin:
        torch.testing.assert_close(leaves[name].grad, twin[name].grad)
    torch.testing.assert_close(y, apart(**twin))
    assert F.linear(torch.zeros(1, WIDTH, dtype=torch.float64), memory).abs().sum() == 0


def test_columns_of_the_product():
    gate, up = make((4,))["gate"], make((4,))["up"]
    _, indices = fixed(torch.float64)
    silu = ACTIVATIONS["silu"]
    found = silu.product_columns(gate, up, indices)
    assert torch.equal(found, silu.product(gate, up).index_select(-1, indices))
