"""A sync that follows one, as the wire has it: how far each element has moved."""

import json
import zlib
from dataclasses import replace

import pytest
import torch

from pacatune.ops.columns import bits
from pacatune.sync import ColumnReceiver, ColumnSource, message
from pacatune.sync.message import Reader, to_wire
from tests.sync.conftest import adapt, assert_bits, clone, merged, nudge, served

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
    reader = Reader()
    receiver.apply(reader.read(*to_wire(source.columns())))
    for number in range(2, 10):
        nudge(model, number)
        columns = source.columns()
        words, buffer = to_wire(columns)
        assert receiver.apply(reader.read(json.loads(json.dumps(words)), buffer.clone()))
        assert_bits(server, merged(model))
        is_complete = number in (5, 9)
        assert words["since"] == (0 if is_complete else number - 1)
        share = buffer.nbytes / columns.num_bytes
        assert (share == 1) == is_complete
        assert is_complete or share < most
        plain, same = to_wire(columns, compress=False)
        assert plain["since"] == 0
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
    columns = ColumnSource(adapt(torch.bfloat16)).columns()
    noise = [torch.randint(256, columns.buffer.shape, generator=G).byte() for _ in range(2)]
    words, buffer = to_wire(replace(columns, buffer=noise[1], last=noise[0]))
    assert buffer is noise[1]
    assert words["since"] == 0


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
    source, receiver, reader = ColumnSource(model), ColumnReceiver(server), Reader()
    receiver.apply(reader.read(*to_wire(source.columns())))
    held = clone(server)
    nudge(model, 0)
    words, buffer = to_wire(source.columns())
    with pytest.raises(ValueError, match=why):
        receiver.apply(reader.read(words, damage(buffer)))
    assert_bits(server, held)
    receiver.apply(reader.read(words, buffer))
    assert_bits(server, merged(model))


def test_an_interval_of_no_syncs():
    with pytest.raises(ValueError, match=r"`complete_every` \(0\) must be at least 1"):
        ColumnSource(adapt(), complete_every=0)
