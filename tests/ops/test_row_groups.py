"""Row groups with columns of their own: where these are, and what is kept of them.

The gradients are in the tests of the operations, beside those of one group.
"""

import pytest
import torch
from torch.nn import functional as F

from pacatune.ops.columns import put_columns_, read_columns, with_columns
from pacatune.ops.row_groups import (
    distinct_and_places,
    flat_positions,
    joined_groups,
    of_rows,
    row_index,
)
from tests.ops import twin
from tests.ops.test_linear import FORMS, every_form, gradients, make
from tests.ops.twin import normal

OUT, IN, RANK = 12, 20, 4


def choose(columns: int = IN) -> torch.Tensor:
    return twin.choose(columns, RANK, 3)


def test_the_reference_is_a_mask_on_the_full_gradient() -> None:
    tensors = make((9,), "groups")
    weight = tensors["weight"].clone().requires_grad_()
    F.linear(tensors["x"], weight).backward(normal(9, OUT, seed=1))
    tensors["delta"].zero_()
    found = gradients("reference", tensors, 0.75, {"delta"})["delta"]
    for row in range(OUT):
        columns = tensors["indices"][row // 3]
        torch.testing.assert_close(found[row], 0.75 * weight.grad[row, columns])


@every_form
def test_layers_that_share_an_input_keep_it_once_where_most_of_it_is_trained(form) -> None:
    tensors = twin.leaves_of(make((2, 5), "few"), {"x", "delta"})
    both = tensors["indices"], tensors["indices"].flip(0)
    given = [*tensors.values(), *both, *(t for one in both for t in distinct_and_places(one))]

    def layers():
        x = tensors["x"] * 1.0
        for indices in both:
            FORMS[form](**{**tensors, "x": x, "indices": indices}, scaling=0.75)

    assert twin.bytes_kept(layers, given) == 2 * 5 * 11 * 8


def test_new_indices_in_the_same_memory_are_seen() -> None:
    tensors, trained = make((5,), "groups"), {"x", "delta"}
    gradients("additive", tensors, 0.75, {"delta"})
    tensors["indices"].copy_((tensors["indices"] + 1).sort(1).values % IN)
    tensors["indices"].copy_(tensors["indices"].sort(1).values)
    both = (gradients(form, tensors, 0.75, trained) for form in ("additive", "reference"))
    twin.assert_equal(*both)


@pytest.mark.parametrize(
    ("shape", "dim", "row_dim"),
    [((12, 11), 1, 0), ((11, 12), 0, 1), ((2, 12, 11), 2, 1), ((2, 11, 12), 1, 2)],
)
def test_where_columns_are(shape, dim, row_dim) -> None:
    weight, indices = normal(*shape), choose(11)
    columns = read_columns(weight, indices, dim=dim, row_dim=row_dim)
    turned = weight.movedim((row_dim, dim), (0, 1))
    found = columns.movedim((row_dim, dim), (0, 1))
    for row in range(12):
        assert found[row].equal(turned[row, indices[row // 4]])
    assert columns.flatten().equal(
        weight.flatten()[flat_positions(indices, shape, dim, row_dim).flatten()]
    )
    changed = weight.clone()
    put_columns_(changed, indices, columns + 1, dim=dim, row_dim=row_dim)
    assert read_columns(changed, indices, dim=dim, row_dim=row_dim).equal(columns + 1)
    assert int((changed != weight).sum()) == columns.numel()
    if (dim, row_dim) == (1, 0) and len(shape) == 2:
        assert with_columns(weight, indices, columns + 1).equal(changed)


def test_joined_groups_are_the_same_update() -> None:
    indices, update = choose(), normal(OUT, RANK, 3)
    joined, distinct = joined_groups(update, indices)
    for row in range(OUT):
        dense = torch.zeros(IN, 3, dtype=torch.float64)
        dense[indices[row // 4]] = update[row]
        assert joined[row].equal(dense[distinct])


@pytest.mark.parametrize(("first", "last"), [(0, 12), (0, 4), (4, 12), (0, 6), (2, 3), (5, 5)])
def test_columns_of_some_rows(first, last) -> None:
    indices, weight = choose(), normal(OUT, IN)
    own = of_rows(indices, OUT, first, last)
    expected = read_columns(weight, indices)[first:last]
    assert read_columns(weight[first:last], own).equal(expected)
    alone = indices[0]
    assert of_rows(alone, OUT, first, last) is alone


def test_an_index_is_no_copy_where_dimensions_repeat() -> None:
    index = row_index(choose(), (5, OUT, IN), 2, 1)
    assert index.shape == (5, OUT, RANK)
    assert index.untyped_storage().nbytes() == OUT * RANK * 8


@every_form
def test_distinct_columns_are_found_once(form, monkeypatch) -> None:
    """Though hooks, as of offloading, give copies of what is saved back."""
    found, unique = [], torch.unique
    monkeypatch.setattr(torch, "unique", lambda *a, **k: found.append(a) or unique(*a, **k))
    tensors = make((5,), "groups")
    for _ in range(3):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
            gradients(form, tensors, 0.75, {"x", "delta"})
    assert len(found) == 1
