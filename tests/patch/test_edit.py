"""Columns before and after, and several patches joined; bits are copied, never numbers."""

from dataclasses import replace

import pytest
import torch

from pacatune.ops.columns import bits
from pacatune.patch import Patch, WeightColumns, stack
from tests.patch.conftest import change_of

WEIGHT = torch.arange(24.0).view(4, 6)
CODES = {"grid": "Q4_0", "values": torch.zeros(4, 2).byte()}


def make_patch(*columns, weight=None, dim=1, seed=0, dtype=torch.bfloat16, fingerprint=None):
    weight = WEIGHT.to(dtype) if weight is None else weight
    shape = [*weight.shape]
    shape[dim] = len(columns)
    new = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    made = change_of("a.weight", dim, weight, [*columns], new)
    return replace(made, fingerprint=fingerprint or {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 2}, r"`dim` \(2\) must be one of the dimensions of \(4, 6\)"),
        ({"indices": torch.tensor([1.0, 2.0])}, "`indices` has dtype torch.float32; it must be"),
        ({"indices": torch.tensor([2, 1])}, "holds 1 at position 1; .* unique, from 0 to 5"),
        ({"indices": torch.arange(0), "values": torch.zeros(4, 0)}, "got \\(0,\\)"),
        ({"indices": torch.tensor([1])}, r"`values` must be \(4, 1\) to fit 1 columns"),
        ({"values": torch.zeros(4, 3)}, r"`values` must be \(4, 2\) .* got \(4, 3\)"),
        ({**CODES, "grid": "Q9"}, "the format 'Q9', or its codes, are not known here; formats are"),
        ({**CODES, "values": 16 + CODES["values"]}, "Q4_0 has codes below 16 alone"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    columns = WeightColumns.of("a.weight", 1, WEIGHT.bfloat16(), torch.tensor([1, 3]))
    with pytest.raises(ValueError, match=message):
        replace(columns, **change)


def test_patches_of_nothing_and_of_two_dtypes_are_refused():
    for build in (lambda: Patch.of([]), lambda: stack([])):
        with pytest.raises(ValueError, match="`before` is empty"):
            build()
    with pytest.raises(ValueError, match=r"is torch.float32 before and torch.bfloat16 after"):
        make_patch(1, weight=WEIGHT)


def test_overlaps_are_refused():
    with pytest.raises(ValueError, match=r"several change columns of 'a.weight', column 4 for one"):
        stack([make_patch(1, 4), make_patch(3, 4, seed=1)])


def test_a_stack_keeps_every_bit():
    odd = torch.tensor([-0.0, float("inf"), float("nan"), 1e-45]).unsqueeze(1).repeat(1, 2)
    weight = torch.zeros(4, 6)
    b = change_of("a.weight", 1, weight, [2, 4], odd)
    after = stack([make_patch(1, 3, weight=weight, dtype=torch.float32), b]).after["a.weight"]
    assert after.indices.tolist() == [1, 2, 3, 4]
    assert torch.equal(bits(after.values[:, [1, 3]]), bits(odd))


def hashed(column, value):
    return make_patch(column, fingerprint={"a.weight": {"5": value}})


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (
            make_patch(1),
            make_patch(2, dtype=torch.float32),
            r"torch.bfloat16 for one, .* torch.float32 for another",
        ),
        (
            make_patch(1),
            make_patch(2, dim=0),
            "for one, which changes it along dimension 1, and .* along 0",
        ),
        (hashed(1, "aa"), hashed(2, "bb"), "disagree about column 5 of 'a.weight', which none"),
    ],
)
def test_patches_that_cannot_be_joined(a, b, message):
    with pytest.raises(ValueError, match=message):
        stack([a, b])


def test_a_stack_knows_the_base_by_what_none_of_them_changes():
    one = make_patch(1, fingerprint={"a.weight": {"2": "x", "5": "y"}})
    two = make_patch(2, fingerprint={"a.weight": {"1": "z", "5": "y"}})
    assert stack([one, two]).fingerprint == {"a.weight": {"5": "y"}}
