"""Whatever a message says, its receiver writes the columns of a sync or raises ValueError."""

import json
import random

import pytest
import torch

from pacatune.sync import ColumnReceiver, ColumnSource
from pacatune.sync.message import from_wire, to_wire
from tests.distributed import net
from tests.mutations import mutated
from tests.sync.conftest import adapt, assert_bits, clone, served
from tests.sync.ranks import held_by


@pytest.mark.parametrize("kind", ["positions", "columns", "change"])
def test_mutated_messages(kind):
    source = ColumnSource(model := adapt())
    positions, columns = source.positions(), source.columns()
    first = columns
    if kind == "change":
        with torch.no_grad():
            for layer in net.layers_of(model):
                layer.delta_of("default")[:2].add_(1)
        columns = source.columns()
        assert columns.follows
    words, buffer = to_wire(positions if kind == "positions" else columns)
    generator, num_refused = random.Random(kind), 0
    servers = [(held_by(clone(served())), True), (clone(served()), False)]
    before = [{name: tensor.clone() for name, tensor in server.items()} for server, _ in servers]
    for number in range(300):
        server, is_partial = servers[number % 2]
        receiver = ColumnReceiver(server, is_partial=is_partial)
        try:
            found = from_wire(mutated(json.loads(json.dumps(words)), generator), buffer)
            if kind == "positions":
                receiver.expect(found)
                receiver.apply(source.columns(everything=True))
            else:
                receiver.expect(positions)
                if kind == "change":
                    receiver.apply(first)
                receiver.apply(found)
        except ValueError:
            num_refused += 1
            receiver.revert()
            assert_bits(server, before[number % 2])
        receiver.revert()
        assert_bits(server, before[number % 2])
    assert num_refused > 100
