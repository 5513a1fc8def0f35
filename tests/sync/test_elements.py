"""Elements at flat places lead a checkpoint to the bits of a merge."""

import pytest
import torch

from pacatune.ops.columns import bits
from pacatune.sync import ColumnSource, element_patches
from pacatune.sync.message import Columns, ColumnSet, Positions
from tests.sync.conftest import adapt, assert_bits, change, clone, merged, nudge, served


def take(server, columns):
    """Write a sync's elements into plain tensors; return how many there are."""
    state, patches = server.state_dict(), element_patches(columns)
    for one in patches:
        tensor = state[one.name]
        assert (one.shape, one.dtype) == (tensor.shape, tensor.dtype)
        assert one.values.dtype == one.dtype
        assert one.indices.dtype == torch.int32
        assert (one.indices.diff() > 0).all()
        assert one.values.is_contiguous()
        assert one.values.shape == one.indices.shape
        tensor.view(-1)[one.indices.long()] = one.values
    return sum(len(one.values) for one in patches)


def test_elements_are_those_that_were_changed():
    model, server = adapt(torch.bfloat16), served(torch.bfloat16)
    source = ColumnSource(model, complete_every=4)
    total = sum(one.values.numel() for one in source.positions().sets)
    assert take(server, source.columns()) == total
    assert_bits(server, merged(model))
    for number in range(2, 7):
        nudge(model, number)
        before, columns = clone(server), source.columns()
        num_taken = take(server, columns)
        state = server.state_dict()
        num_changed = sum(int((bits(before[k]) != bits(state[k])).sum()) for k in before)
        assert 0 < num_changed < total / 2
        assert num_taken == (total if columns.last is None else num_changed)
        assert (columns.last is not None) == (number != 5)
        assert_bits(server, merged(model))
    change(model, 3, by=1e-3)
    columns = source.columns()
    names = [item.name for item in element_patches(columns)]
    assert names == [columns.positions.sets[3].name]
    take(server, columns)
    assert_bits(server, merged(model))
    assert element_patches(source.columns()) == []


def test_a_tensor_that_is_too_large():
    one = ColumnSet.at(
        name="large",
        parameter="large",
        dim=1,
        shape=(2**16, 2**16),
        dtype=torch.bfloat16,
        indices=torch.tensor([3]),
    )
    positions = Positions(sets=(one,), shapes={}, run="")
    buffer = torch.zeros(one.values.nbytes, dtype=torch.uint8)
    columns = Columns(positions=positions, number=1, buffer=buffer)
    with pytest.raises(ValueError, match="'large' has 4294967296 elements, and int32 counts"):
        element_patches(columns)
