"""Patterns: what an update of all kept columns has to do with that of each row.

The gradients are in the tests of the operations, beside those without a pattern.
"""

import pytest
import torch
from torch.nn import functional as F

from pacatune.ops.pattern import collect, expand
from tests.ops import twin
from tests.ops.test_linear import gradients, make
from tests.ops.twin import normal

OUT, RANK, GROUPS = 12, 4, 3


@pytest.mark.parametrize("groups", [1, GROUPS])
def test_the_reference_is_a_mask_on_the_full_gradient(groups) -> None:
    tensors = {**make((9,)), **twin.choose(11, RANK, groups)}
    weight = tensors["weight"].clone().requires_grad_()
    F.linear(tensors["x"], weight).backward(normal(9, OUT, seed=1))
    tensors["delta"].zero_()
    found = gradients("reference", tensors, 0.75, {"delta"})["delta"]
    for row in range(OUT):
        places = slice(None) if groups == 1 else tensors["places"][row // (OUT // groups)]
        columns = tensors["indices"][places]
        torch.testing.assert_close(found[row], 0.75 * weight.grad[row, columns])


@pytest.mark.parametrize(
    ("shape", "dim"), [((OUT, RANK), 1), ((OUT, RANK, 3), 1), ((5, OUT, RANK), 2)]
)
def test_expanded_and_collected(shape, dim) -> None:
    indices, places = twin.choose(11, RANK, GROUPS).values()
    delta = normal(*shape).requires_grad_()
    whole = expand(delta, places, len(indices), dim)
    by_row, own = (one.detach().movedim((dim - 1, dim), (0, 1)) for one in (whole, delta))
    for row in range(OUT):
        expected = torch.zeros_like(by_row[row])
        expected[places[row // 4]] = own[row]
        assert by_row[row].equal(expected)
    assert collect(whole, places, dim).equal(delta)
    gradient = normal(*whole.shape, seed=1)
    whole.backward(gradient)
    assert delta.grad.equal(collect(gradient, places, dim))


def test_a_process_without_rows() -> None:
    places = torch.empty(0, RANK, dtype=torch.int64)
    assert expand(torch.empty(0, RANK), places, 9).shape == (0, 9)
    assert collect(torch.empty(0, 9), places).shape == (0, RANK)
