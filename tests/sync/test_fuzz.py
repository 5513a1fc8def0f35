"""Whatever a message says, its receiver writes the columns of a sync or raises ValueError."""

import json
import random

import pytest
import torch

from pacatune.sync import ColumnReceiver, ColumnSource
from pacatune.sync.message import from_wire, to_wire
from tests.mutations import mutated
from tests.sync.conftest import adapt, assert_bits, served


def fused():
    """The tensors of a server that joins some of them."""
    tensors = dict(served().state_dict())
    for layer in ("model.layers.0.", "model.layers.1."):
        for joined, parts in (
            ("self_attn.qkv_proj", [f"self_attn.{one}_proj" for one in "qkv"]),
            ("mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"]),
        ):
            found = [tensors.pop(f"{layer}{part}.weight") for part in parts]
            tensors[f"{layer}{joined}.weight"] = torch.cat(found)
    return tensors


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kind", ["positions", "columns"])
def test_mutated_messages(kind, groups):
    source = ColumnSource(adapt(groups=groups))
    positions, columns = source.positions(), source.columns()
    words, buffer = to_wire(positions if kind == "positions" else columns)
    generator, num_refused = random.Random(f"{kind} {groups}"), 0
    servers = [(fused(), True), (dict(served().state_dict()), False)]
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
                receiver.apply(found)
        except ValueError:
            num_refused += 1
            assert_bits(server, before[number % 2])
        receiver.revert()
        assert_bits(server, before[number % 2])
    assert num_refused > 100
