"""Checkpoints of your own loop, as the docs make them, read by other processes."""

import pytest
import torch

from tests.distributed import net
from tests.distributed.tensor_parallel import adapt, load, marks, whole
from tests.distributed.ways import shard
from tests.docs.blocks import read_blocks

pytestmark = marks


RECIPE: dict = {}
exec(next(b.code for b in read_blocks("docs/distributed.md") if "def load(model" in b.code), RECIPE)


def build(base, kind):
    """A model in one process, in shards, or in shards of parts."""
    if kind == "parts":
        model = adapt(load(base, tp_size=2, fsdp_size=2))
    else:
        model = adapt(load(base, parts=False))
        model = shard(model) if kind == "shards" else model
    return model, torch.optim.AdamW(net.trained(model), lr=1e-2)


def part_of(kind, ids):
    if kind == "parts":
        return ids.chunk(2)[torch.distributed.get_rank() // 2]
    return net.half(ids) if kind == "shards" else ids


def step(model, optimizer, kind, batches):
    for batch in batches:
        net.loss_of(model, part_of(kind, batch)).backward()
        optimizer.step()
        optimizer.zero_grad()


def tensors_of(model, optimizer):
    """All that is trained, and its optimizer's state, in full."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(ignore_frozen_params=True)
    weights, states = get_state_dict(model, optimizer, options=options)
    found = dict(weights)
    for name, values in states["state"].items():
        found |= {f"{name}.{key}": value for key, value in values.items()}
    return {name: whole(tensor) for name, tensor in found.items()}


def save(base, kind, folder):
    """Save after three steps; return the state then and two steps later."""
    model, optimizer = build(base, kind)
    step(model, optimizer, kind, net.batches()[:3])
    RECIPE["save"](model, optimizer, folder)
    saved = tensors_of(model, optimizer)
    step(model, optimizer, kind, net.batches()[3:])
    return saved, tensors_of(model, optimizer)


def go_on(base, kind, folder):
    model, optimizer = build(base, kind)
    RECIPE["load"](model, optimizer, folder)
    loaded = tensors_of(model, optimizer)
    step(model, optimizer, kind, net.batches()[3:])
    return loaded, tensors_of(model, optimizer)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", ["shards", "parts"])
def test_any_number_of_processes_goes_on(pair, four, save_base, tmp_path, kind):
    group = pair if kind == "shards" else four
    base, folder = save_base(), str(tmp_path / "checkpoint")
    saved, ended = group.run(save, base, kind, folder)[0]
    assert any("paca_delta" in name and "exp_avg_sq" in name for name in saved)
    assert not any("base_layer" in name for name in saved)
    for loaded, again in group.run(go_on, base, kind, folder):
        torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
        torch.testing.assert_close(again, ended, rtol=0, atol=0)
    others = [go_on(base, "one", folder), *four.run(go_on, base, "shards", folder)]
    for loaded, again in others:
        torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
        torch.testing.assert_close(again, ended, rtol=0, atol=1e-10)
