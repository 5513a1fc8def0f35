"""Whatever a message says, its receiver writes the columns of a sync or raises ValueError."""

import json
import random

import pytest
import torch

from pacatune.sync import ColumnReceiver, ColumnSource
from pacatune.sync.message import Reader, to_wire
from tests.distributed import net
from tests.mutations import mutated
from tests.sync.conftest import adapt, assert_bits, clone, served
from tests.sync.ranks import held_by


@pytest.mark.parametrize("kind", ["columns", "change"])
def test_mutated_messages(kind):
    source = ColumnSource(model := adapt())
    columns = source.columns()
    first = to_wire(columns)
    if kind == "change":
        with torch.no_grad():
            for layer in net.layers_of(model):
                layer.delta_of("default")[:2].add_(1)
        columns = source.columns()
        assert columns.last is not None
    words, buffer = to_wire(columns)
    generator, num_refused = random.Random(kind), 0
    servers = [(held_by(clone(served())), True), (clone(served()), False)]
    before = [{name: tensor.clone() for name, tensor in server.items()} for server, _ in servers]
    for number in range(300):
        server, is_partial = servers[number % 2]
        receiver, reader = ColumnReceiver(server, is_partial=is_partial), Reader()
        if kind == "change":
            receiver.apply(reader.read(*first))
        try:
            mutant = mutated(json.loads(json.dumps(words)), generator)
            receiver.apply(reader.read(mutant, buffer))
        except ValueError:
            num_refused += 1
            receiver.revert()
            assert_bits(server, before[number % 2])
        receiver.revert()
        assert_bits(server, before[number % 2])
    assert num_refused > 100
