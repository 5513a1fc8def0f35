"""Checkpoints of your own loop, as the docs make them, read by other processes."""

import pytest
import torch

from tests.distributed import net
from tests.distributed.ways import shard
from tests.docs.blocks import read_blocks

pytestmark = pytest.mark.slow


RECIPE: dict = {}
exec(next(b.code for b in read_blocks("docs/distributed.md") if "def load(model" in b.code), RECIPE)


def build(kind):
    """A model in one process, or in shards."""
    model = shard(net.adapt()) if kind == "shards" else net.adapt()
    return model, torch.optim.AdamW(net.trained(model), lr=1e-2)


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(model, optimizer, kind, batches):
    for ids in batches:
        net.step(model, optimizer, net.half(ids) if kind == "shards" else ids)


def tensors_of(model, optimizer):
    """All that is trained, and its optimizer's state, in full."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(ignore_frozen_params=True)
    weights, states = get_state_dict(model, optimizer, options=options)
    found = dict(weights)
    for name, values in states["state"].items():
        found |= {f"{name}.{key}": value for key, value in values.items()}
    return {name: whole(tensor) for name, tensor in found.items()}


def save(kind, folder):
    """Save after three steps; return the state then and two steps later."""
    model, optimizer = build(kind)
    train(model, optimizer, kind, net.batches()[:3])
    RECIPE["save"](model, optimizer, folder)
    saved = tensors_of(model, optimizer)
    train(model, optimizer, kind, net.batches()[3:])
    return saved, tensors_of(model, optimizer)


def go_on(kind, folder):
    model, optimizer = build(kind)
    RECIPE["load"](model, optimizer, folder)
    loaded = tensors_of(model, optimizer)
    train(model, optimizer, kind, net.batches()[3:])
    return loaded, tensors_of(model, optimizer)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_any_number_of_processes_goes_on(pair, four, tmp_path):
    folder = str(tmp_path / "checkpoint")
    saved, ended = pair.run(save, "shards", folder)[0]
    assert any("paca_delta" in name and "exp_avg_sq" in name for name in saved)
    assert not any("base_layer" in name for name in saved)
    for loaded, again in pair.run(go_on, "shards", folder):
        torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
        torch.testing.assert_close(again, ended, rtol=0, atol=0)
    others = [go_on("one", folder), *four.run(go_on, "shards", folder)]
    for loaded, again in others:
        torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
        torch.testing.assert_close(again, ended, rtol=0, atol=1e-10)
