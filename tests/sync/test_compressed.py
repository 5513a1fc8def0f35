"""A sync that follows one, as the wire has it: how far each element has moved."""

import json
import zlib
from dataclasses import replace

import pytest
import torch

from pacatune.ops.columns import bits
from pacatune.sync import ColumnReceiver, ColumnSource, message
from pacatune.sync.message import from_wire, to_wire
from tests.sync.conftest import adapt, assert_bits, bring, change, clone, merged, nudge, served

G = torch.Generator().manual_seed(0)


def packed(size):
    """So many zeros, in few bytes."""
    return torch.frombuffer(bytearray(zlib.compress(bytes(size))), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 0.7), (torch.float16, 0.35), (torch.bfloat16, 0.16)]
)
def test_small_steps_are_few_bytes(dtype, most):
    model, server = adapt(dtype), served(dtype)
    source, receiver = ColumnSource(model, complete_every=4), ColumnReceiver(server)
    bring(source, receiver)
    for number in range(2, 10):
        nudge(model, number)
        columns = source.columns()
        words, buffer = to_wire(columns)
        assert receiver.apply(from_wire(json.loads(json.dumps(words)), buffer.clone()))
        assert_bits(server, merged(model))
        is_complete = number in (5, 9)
        assert words["compressed"] == (not is_complete)
        assert words["since"] == (0 if is_complete else number - 1)
        share = buffer.nbytes / columns.num_bytes
        assert (share == 1) == is_complete
        assert is_complete or share < most
        plain, same = to_wire(columns, compress=False)
        assert (plain["since"], plain["compressed"]) == (0, False)
        assert same is columns.buffer
    receiver.revert()
    assert_bits(server, served(dtype).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_any_bits_to_any_bits(dtype):
    """Zeros of both signs, subnormals, the largest, and what is no number."""
    size = 4096 * dtype.itemsize
    raw = [torch.randint(256, (size,), dtype=torch.uint8, generator=G) for _ in range(2)]
    for one, other in (raw, raw[::-1], (raw[0], raw[0])):
        new, old = one.view(dtype), other.view(dtype)
        moved = message._moved(new, old)
        assert torch.equal(message._moved_to(moved, old), one)
        assert (one is other) == (not moved.any())
    near = torch.tensor([0.0, -0.0, 1.0, -1.0, 2**-130 if dtype.itemsize > 1 else 2**-9]).to(dtype)
    after = bits(near) + torch.tensor([1, 1, -1, 1, -1]).to(bits(near).dtype)
    places = [4, 0, 2, 3, 1]  # 0 and -0 are neighbours
    assert message._moved(after.view(dtype), near)[:5].max() <= 2
    assert message._moved(bits(near)[places].view(dtype), near).any()


def test_what_would_grow_is_sent_as_it_is():
    source = ColumnSource(adapt(torch.bfloat16))
    source.columns()
    columns = source.columns(everything=True)
    places = source.positions().layout(columns.ordinals)
    noise = [torch.randint(256, columns.buffer.shape, generator=G).byte() for _ in range(2)]
    last = {one.name: message.view_of(noise[0], one, start) for _, one, start in places}
    words, buffer = to_wire(replace(columns, buffer=noise[1], follows=(places, last)))
    assert buffer is noise[1]
    assert (words["compressed"], words["since"]) == (False, 0)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda buffer: buffer[:-1], r"it does not have \d+ bytes"),
        (lambda buffer: torch.cat([buffer, buffer[:1]]), "it does not have"),
        (lambda buffer: buffer[:9], "it does not have"),
        (lambda buffer: buffer[:0], "it does not have"),
        (lambda buffer: packed(1 << 20), "it does not have"),
        (lambda buffer: buffer.flip(0), "Error -3"),
        (lambda buffer: buffer[None].expand(2, -1), "Error -3|does not have"),
    ],
)
def test_damaged_changes(damage, why):
    model, server = adapt(torch.bfloat16), served(torch.bfloat16)
    source, receiver = ColumnSource(model), ColumnReceiver(server)
    bring(source, receiver)
    held = clone(server)
    nudge(model, 0)
    words, buffer = to_wire(source.columns())
    with pytest.raises(ValueError, match=why):
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
