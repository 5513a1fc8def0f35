"""The product of gated MLPs."""

import pytest
import torch

from pacatune.lean import ACTIVATIONS, gated_product
from tests.lean.twins import assert_within_own_error, run

SHAPES = [(6,), (5, 6), (2, 3, 6), (0, 6)]


def plain(gate, up, activation):
    return ACTIVATIONS[activation].value(gate) * up


def make(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return {"gate": (3 * gate).to(dtype), "up": up.to(dtype)}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    tensors = {name: x.requires_grad_() for name, x in make((2, 3, 6)).items()}
    assert torch.autograd.gradcheck(
        lambda gate, up: gated_product(gate, up, activation), tuple(tensors.values())
    )


BOTH = {"gate", "up"}


@pytest.mark.parametrize(
    ("activation", "shape", "trained", "dtype"),
    [
        *((activation, (5, 6), BOTH, torch.bfloat16) for activation in ACTIVATIONS),
        *(("silu", shape, BOTH, torch.float32) for shape in SHAPES),
        *(("silu", (2, 3, 6), {name}, torch.bfloat16) for name in ("gate", "up")),
    ],
)
def test_equals_plain(activation, shape, trained, dtype):
    tensors = make(shape, dtype)
    ours, _ = run(lambda **x: gated_product(**x, activation=activation), tensors, trained)
    theirs, _ = run(lambda **x: plain(**x, activation=activation), tensors, trained)
    exact, _ = run(
        lambda **x: plain(**x, activation=activation),
        {name: x.double() for name, x in tensors.items()},
        trained,
    )
    assert torch.equal(ours["y"], theirs["y"])
    assert_within_own_error(ours, theirs, exact)


def test_silu_gives_the_very_gradients_of_autograd():
    tensors = make((40, 64), torch.bfloat16)
    ours, _ = run(gated_product, tensors, {"gate", "up"})
    theirs, _ = run(lambda **x: plain(**x, activation="silu"), tensors, {"gate", "up"})
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu2"])
def test_keeps_gate_and_up_alone(activation):
    tensors = make((10, 6), torch.bfloat16)
    _, ours = run(lambda **x: gated_product(**x, activation=activation), tensors, {"gate", "up"})
    _, theirs = run(lambda **x: plain(**x, activation=activation), tensors, {"gate", "up"})
    assert ours == 2 * 10 * 6 * 2
    assert theirs >= 3 * 10 * 6 * 2


def test_two_dtypes():
    tensors = make((5, 6))
    tensors["gate"] = tensors["gate"].bfloat16()
    ours, _ = run(gated_product, tensors, {"gate", "up"})
    theirs, _ = run(lambda **x: plain(**x, activation="silu"), tensors, {"gate", "up"})
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype
        torch.testing.assert_close(ours[name], expected, atol=0.02, rtol=0.02)


def test_retained_graph_gives_equal_gradients_twice():
    tensors = {name: x.requires_grad_() for name, x in make((5, 6)).items()}
    y = gated_product(**tensors).sum()
    first = torch.autograd.grad(y, tuple(tensors.values()), retain_graph=True)
    second = torch.autograd.grad(y, tuple(tensors.values()))
    assert all(map(torch.equal, first, second))


def test_an_inplace_change_between_is_noticed():
    tensors = make((5, 6))
    gate, up = tensors["gate"].requires_grad_(), tensors["up"].clone()
    y = gated_product(gate, up)
    up.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_errors():
    tensors = make((5, 6))
    with pytest.raises(ValueError, match=r"`activation` \('swish'\) must be one of"):
        gated_product(**tensors, activation="swish")
    with pytest.raises(ValueError, match=r"one shape, got \(5, 6\) and \(4, 6\)"):
        gated_product(tensors["gate"], tensors["up"][:4])
    gate = tensors["gate"].requires_grad_()
    with pytest.raises(RuntimeError, match="gated_product has no second derivative; call"):
        torch.autograd.grad(gated_product(gate, tensors["up"]).sum(), gate, create_graph=True)
