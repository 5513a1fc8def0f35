from dataclasses import replace

import pytest
import torch

from pacatune.patch import ColumnEdit, Patch, edit_of, stack
from pacatune.patch.edit import bits, column_bits, put_bits_, shared_columns


def make_edit(columns, *, weight=None, name="a.weight", dim=1, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.arange(24.0).view(4, 6).to(dtype) if weight is None else weight
    indices = torch.tensor(columns)
    new = torch.randn(weight.index_select(dim, indices).shape, generator=generator).to(dtype)
    return edit_of(name, dim, weight, indices, new)


def make_patch(*columns, **options):
    edit = make_edit([*columns], **options)
    return Patch(edits={edit.name: edit})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 2}, r"`dim` \(2\) must be one of the dimensions of \(4, 6\)"),
        ({"indices": torch.tensor([1.0, 2.0])}, r"`indices` must be \(R,\) int64, got \(2,\) of"),
        ({"indices": torch.tensor([2, 1])}, "must increase from 0 on and stay below 6"),
        ({"indices": torch.tensor([1, 1])}, "must increase"),
        ({"indices": torch.tensor([-1, 1])}, "must increase"),
        ({"indices": torch.tensor([1, 6])}, "stay below 6"),
        ({"indices": torch.tensor([1])}, r"`original` must be \(4, 1\) to fit 1 columns"),
        ({"new": torch.zeros(4, 3)}, r"`new` must be \(4, 2\) .* got \(4, 3\)"),
        ({"new": torch.zeros(4, 2)}, "`original` is torch.bfloat16 and `new` is torch.float32"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    parts = {**vars(make_edit([1, 3])), **change}
    with pytest.raises(ValueError, match=message):
        ColumnEdit(**parts)


def test_an_edit_of_no_columns_is_refused():
    empty = torch.zeros(4, 0)
    no_columns = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="must increase"):
        ColumnEdit(name="a", dim=1, shape=(4, 6), indices=no_columns, original=empty, new=empty)


def test_patches_of_nothing_and_of_other_names_are_refused():
    with pytest.raises(ValueError, match="`edits` is empty"):
        Patch(edits={})
    with pytest.raises(ValueError, match=r"has the edit of 'a.weight' under the name 'b'"):
        Patch(edits={"b": make_edit([1])})


def test_the_inverse_takes_back():
    patch = make_patch(1, 4)
    edit, inverse = patch.edits["a.weight"], patch.inverse().edits["a.weight"]
    assert torch.equal(inverse.new, edit.original)
    assert torch.equal(inverse.original, edit.new)
    assert patch.num_bytes == 4 * 2 * 2
    assert patch.num_columns == 2


def test_disjoint_patches_stack_in_any_order():
    a, b = make_patch(1, 4), make_patch(0, 5, seed=1)
    c = make_patch(2, name="b.weight", seed=2)
    for order in ((a, b, c), (c, b, a)):
        joint = stack(order)
        edit = joint.edits["a.weight"]
        assert edit.indices.tolist() == [0, 1, 4, 5]
        assert torch.equal(edit.new[:, 1:3], a.edits["a.weight"].new)
        assert torch.equal(edit.new[:, [0, 3]], b.edits["a.weight"].new)
        assert torch.equal(edit.original, torch.arange(24.0).view(4, 6).bfloat16()[:, edit.indices])
        assert torch.equal(joint.edits["b.weight"].new, c.edits["b.weight"].new)
    with pytest.raises(ValueError, match="`patches` is empty"):
        stack([])


def test_overlaps_are_refused_unless_told_how():
    a, b = make_patch(1, 4), make_patch(3, 4, seed=1)
    with pytest.raises(
        ValueError, match=r"1 columns of 'a.weight' are .* column 4 for one\. Choose"
    ):
        stack([a, b])
    mine, theirs = (patch.edits["a.weight"].new for patch in (a, b))
    for overlap, column in (("first", mine[:, 1]), ("last", theirs[:, 1])):
        edit = stack([a, b], overlap=overlap).edits["a.weight"]
        assert edit.indices.tolist() == [1, 3, 4]
        assert torch.equal(edit.new, torch.stack((mine[:, 0], theirs[:, 0], column), 1))


def test_a_sum_adds_the_changes_and_rounds_once():
    a, b = make_patch(1, 4), make_patch(3, 4, seed=1)
    edit = stack([a, b], overlap="sum").edits["a.weight"]
    mine, theirs = a.edits["a.weight"], b.edits["a.weight"]
    base = mine.original[:, 1].double()
    expected = base + (mine.new[:, 1].double() - base) + (theirs.new[:, 1].double() - base)
    assert torch.equal(edit.new[:, 2], expected.bfloat16())
    assert torch.equal(edit.new[:, :2], torch.stack((mine.new[:, 0], theirs.new[:, 0]), 1))


def test_a_sum_leaves_single_columns_to_the_bit():
    weight = torch.zeros(4, 6)
    a = make_patch(1, 4, weight=weight, dtype=torch.float32)
    odd = torch.tensor([-0.0, float("inf"), float("nan"), 1e-45]).unsqueeze(1).repeat(1, 2)
    b = Patch(edits={"a.weight": edit_of("a.weight", 1, weight, torch.tensor([2, 4]), odd)})
    edit = stack([a, b], overlap="sum").edits["a.weight"]
    assert torch.equal(bits(edit.new[:, 1].contiguous()), bits(odd[:, 0].contiguous()))


def test_patches_of_different_bases_do_not_stack():
    a = make_patch(1, 4)
    other = make_patch(4, 5, weight=torch.ones(4, 6).bfloat16())
    with pytest.raises(ValueError, match="different bases: they disagree about columns"):
        stack([a, other], overlap="sum")
    with pytest.raises(ValueError, match=r"different bases: .* for one and .*float32 for another"):
        stack([a, make_patch(2, dtype=torch.float32)])
    with pytest.raises(ValueError, match=r"along dimension 1 by one patch and along 0 by another"):
        stack([a, make_patch(2, dim=0)])
    edits = ({"a.weight": make_edit([1])}, {"a.weight": make_edit([2])})
    one, two = (
        Patch(edits=edit, fingerprint={"a.weight": {5: hashed}})
        for edit, hashed in zip(edits, ("aa", "bb"), strict=True)
    )
    with pytest.raises(ValueError, match=r"disagree about column 5 of 'a.weight', which none"):
        stack([one, two])


def test_a_stack_knows_the_base_by_what_none_of_them_changes():
    one = Patch(edits={"a.weight": make_edit([1])}, fingerprint={"a.weight": {2: "x", 5: "y"}})
    two = Patch(edits={"a.weight": make_edit([2])}, fingerprint={"a.weight": {1: "z", 5: "y"}})
    assert stack([one, two]).fingerprint == {"a.weight": {5: "y"}}


def test_shared_columns_are_counted():
    a, b = make_patch(1, 4).edits, make_patch(3, 4).edits
    assert shared_columns(a, b) == {"a.weight": 1}
    assert shared_columns(a, make_patch(0).edits) == {}
    assert shared_columns(a, make_patch(0, dim=0).edits) == {"a.weight": 2}


def grouped_edit(seed=0, **options):
    """Two row groups of a (4, 6) tensor."""
    weight = torch.arange(24.0).view(4, 6)
    indices = torch.tensor([[0, 2], [2, 5]])
    new = torch.randn(4, 2, generator=torch.Generator().manual_seed(seed))
    return weight, edit_of("a.weight", 1, weight, indices, new, **options)


def test_row_groups_have_columns_of_their_own():
    weight, edit = grouped_edit()
    assert edit.original.tolist() == [[0, 2], [6, 8], [14, 17], [20, 23]]
    changed = weight.clone()
    put_bits_(changed, 1, edit.indices, edit.new, edit.row_dim)
    assert int((changed != weight).sum()) == 8
    found = column_bits(changed, 1, edit.indices, edit.row_dim)
    assert torch.equal(found.view(torch.float32), edit.new)
    put_bits_(changed, 1, edit.indices, edit.original, edit.row_dim)
    assert torch.equal(changed, weight)
    assert stack([Patch(edits={"a.weight": edit})]).edits["a.weight"] is edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_dim": 1}, "its 2 row groups must divide a dimension of .* got `row_dim` = 1"),
        ({"indices": torch.tensor([[0, 2], [5, 2]])}, "must increase from 0 on"),
        ({"indices": torch.tensor([[0, 2], [2, 6]])}, "stay below 6"),
        ({"indices": torch.tensor([[0, 2], [1, 2], [2, 5]])}, "its 3 row groups must divide"),
    ],
)
def test_row_groups_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        replace(grouped_edit()[1], **change)


def test_patches_of_row_groups_of_one_tensor_are_not_joined():
    patches = [Patch(edits={"a.weight": grouped_edit(seed)[1]}) for seed in range(2)]
    with pytest.raises(ValueError, match="one of them has row groups; such patches cannot be"):
        stack(patches, overlap="sum")
    assert shared_columns(*(one.edits for one in patches)) == {"a.weight": 3}
