"""Syncs of elements: those that were changed, of columns that the receiver has."""

import pytest
import torch

from pacatune.sync import ColumnReceiver, ColumnSource
from pacatune.sync.message import from_wire, to_wire
from tests.sync.conftest import adapt, assert_bits, bring, change, clone, merged, nudge, served


def test_elements_that_small_steps_change_are_sent():
    model, server = adapt(torch.bfloat16), served(torch.bfloat16)
    source, receiver = ColumnSource(model, complete_every=4), ColumnReceiver(server)
    bring(source, receiver)
    total = source.positions().num_bytes // 2
    for number in range(2, 10):
        nudge(model, number)
        before = clone(server)
        columns = source.columns()
        words, buffer = to_wire(columns)
        assert receiver.apply(from_wire(words, buffer.clone()))
        assert_bits(server, merged(model))
        changed = sum(int((before[k] != v).sum()) for k, v in server.state_dict().items())
        assert 0 < changed < total / 2
        is_complete = number in (5, 9)
        assert columns.since == (0 if is_complete else number - 1)
        assert columns.num_bytes == (2 * total if is_complete else 2 * changed + -(-total // 8))
    receiver.revert()
    assert_bits(server, served(torch.bfloat16).state_dict())


def test_elements_of_a_sync_that_follows_another_one():
    model, server = adapt(torch.bfloat16), served(torch.bfloat16)
    source, receiver = ColumnSource(model), ColumnReceiver(server)
    bring(source, receiver)
    nudge(model, 0)
    missed = source.columns()
    nudge(model, 1)
    held = clone(server)
    with pytest.raises(ValueError, match="sync 3 has the columns changed since sync 2, and the"):
        receiver.apply(source.columns())
    late = ColumnReceiver(served(torch.bfloat16))
    late.expect(source.positions())
    with pytest.raises(ValueError, match="sync 2 has the columns changed since sync 1, and the"):
        late.apply(missed)
    with pytest.raises(ValueError, match=r"follow a sync which is not here; call `source\.forget"):
        missed.by_name(source.positions())
    assert_bits(server, held)
    source.forget()
    bring(source, receiver)
    assert receiver.number == 4
    assert_bits(server, merged(model))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda buffer: buffer[:-1], r"damaged: \d+ bytes were changed, and \d+ are here"),
        (lambda buffer: buffer[:9], "does not say which elements were changed"),
        (lambda buffer: buffer[:0], "does not say which elements were changed"),
        (lambda buffer: buffer.flip(0), "bytes were changed, and"),
        (lambda buffer: buffer[None], "does not say which elements were changed"),
    ],
)
def test_damaged_elements(damage, message):
    model, server = adapt(torch.bfloat16), served(torch.bfloat16)
    source, receiver = ColumnSource(model), ColumnReceiver(server)
    bring(source, receiver)
    held = clone(server)
    nudge(model, 0)
    words, buffer = to_wire(source.columns())
    with pytest.raises(ValueError, match=message):
        receiver.apply(from_wire(words, damage(buffer)))
    assert_bits(server, held)
    receiver.apply(from_wire(words, buffer))
    assert_bits(server, merged(model))


def test_every_so_often_a_sync_is_complete():
    """Also where only some of the tensors are trained."""
    source, receiver = ColumnSource(model := adapt(), complete_every=3), ColumnReceiver(served())
    bring(source, receiver)
    found = []
    for _ in range(5):
        change(model)
        found.append(columns := source.columns())
        receiver.apply(columns)
    assert [columns.since for columns in found] == [1, 2, 0, 4, 5]
    assert [len(columns.ordinals) for columns in found] == [1, 1, 14, 1, 1]
    assert_bits(receiver.model, merged(model))
    with pytest.raises(ValueError, match=r"`complete_every` \(0\) must be at least 1"):
        ColumnSource(adapt(), complete_every=0)
    source = ColumnSource(model := adapt(torch.bfloat16), complete_every=1)
    for number in range(3):
        nudge(model, number)
        assert source.columns().since == 0
