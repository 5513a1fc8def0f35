"""Edits of columns, their inverse, and several of them joined; bits are copied, never numbers."""

from dataclasses import replace

import pytest
import torch

from pacatune.ops.columns import bits
from pacatune.patch import Patch, edit_of, stack

WEIGHT = torch.arange(24.0).view(4, 6)
NOTHING = torch.zeros(4, 0)
# Without a hash of their scales, under which they are numbers.
CODES = {"grid": "Q4_0", **dict.fromkeys(("original", "new"), torch.zeros(4, 2).byte())}


def make_edit(columns, *, weight=None, name="a.weight", dim=1, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    weight = WEIGHT.to(dtype) if weight is None else weight
    indices = torch.tensor(columns)
    shape = [*weight.shape]
    shape[dim] = len(indices)
    return edit_of(name, dim, weight, indices, torch.randn(shape, generator=generator).to(dtype))


def make_patch(*columns, fingerprint=None, **options):
    edit = make_edit([*columns], **options)
    return Patch(edits={edit.name: edit}, fingerprint=fingerprint or {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 2}, r"`dim` \(2\) must be one of the dimensions of \(4, 6\)"),
        ({"indices": torch.tensor([1.0, 2.0])}, "`indices` has dtype torch.float32; it must be"),
        ({"indices": torch.tensor([2, 1])}, "holds 1 at position 1; .* unique, from 0 to 5"),
        ({"indices": torch.arange(0), "original": NOTHING, "new": NOTHING}, "got \\(0,\\)"),
        ({"indices": torch.tensor([1])}, r"`original` must be \(4, 1\) to fit 1 columns"),
        ({"new": torch.zeros(4, 3)}, r"`new` must be \(4, 2\) .* got \(4, 3\)"),
        ({"new": torch.zeros(4, 2)}, "`original` is torch.bfloat16 and `new` is torch.float32"),
        ({**CODES, "grid": "Q9"}, "the format 'Q9', or its codes, are not known here; formats are"),
        ({**CODES, "new": 16 + CODES["new"]}, "Q4_0 has codes below 16 alone"),
        (CODES, "the edit of 'a.weight': codes need `scales`"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(make_edit([1, 3]), **change)


def test_patches_of_nothing_and_of_other_names_are_refused():
    with pytest.raises(ValueError, match="`edits` is empty"):
        Patch(edits={})
    with pytest.raises(ValueError, match=r"has the edit of 'a.weight' under the name 'b'"):
        Patch(edits={"b": make_edit([1])})
    with pytest.raises(ValueError, match="`patches` is empty"):
        stack([])


def test_overlaps_are_refused():
    with pytest.raises(ValueError, match=r"several change columns of 'a.weight', column 4 for one"):
        stack([make_patch(1, 4), make_patch(3, 4, seed=1)])


def test_a_stack_keeps_every_bit():
    odd = torch.tensor([-0.0, float("inf"), float("nan"), 1e-45]).unsqueeze(1).repeat(1, 2)
    weight = torch.zeros(4, 6)
    b = Patch(edits={"a.weight": edit_of("a.weight", 1, weight, torch.tensor([2, 4]), odd)})
    edit = stack([make_patch(1, 3, weight=weight, dtype=torch.float32), b]).edits["a.weight"]
    assert edit.indices.tolist() == [1, 2, 3, 4]
    assert torch.equal(bits(edit.new[:, [1, 3]]), bits(odd))


def hashed(column, value):
    return make_patch(column, fingerprint={"a.weight": {5: value}})


def coded(column, scales):
    edit = make_edit([column], dtype=torch.uint8)
    return Patch(edits={edit.name: replace(edit, grid="Q8_0", scales=scales)})


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (make_patch(1), make_patch(2, dtype=torch.float32), r"bases: .* for one and .*float32 for"),
        (make_patch(1), make_patch(2, dim=0), "along dimension 1 by one patch and along 0 by"),
        (hashed(1, "aa"), hashed(2, "bb"), "disagree about column 5 of 'a.weight', which none"),
        (coded(1, "aa"), coded(2, "bb"), "bases: .* other scales of the codes of 'a.weight'"),
    ],
)
def test_patches_that_cannot_be_joined(a, b, message):
    with pytest.raises(ValueError, match=message):
        stack([a, b])


def test_a_stack_knows_the_base_by_what_none_of_them_changes():
    one = make_patch(1, fingerprint={"a.weight": {2: "x", 5: "y"}})
    two = make_patch(2, fingerprint={"a.weight": {1: "z", 5: "y"}})
    assert stack([one, two]).fingerprint == {"a.weight": {5: "y"}}
