"""Lean models in several processes."""

import pytest
import torch

from pacatune import lean
from tests.distributed import net
from tests.distributed.ways import full_adapter_of, shard

pytestmark = pytest.mark.slow


def own_loss(model, ids):
    """The model's own loss: what lean heads are for."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def train_lean(order, level):
    model = net.adapt("float32").train()
    if order == "lean first":
        lean.enable(model, mode="require", level=level)
    if order == "ddp":
        lean.enable(model, mode="require", level=level)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        wrapped = shard(model)
    if order == "sharded first":
        lean.enable(model, mode="require", level=level)
    losses = net.train(wrapped, part=net.half, loss_of=own_loss)
    adapter = net.adapter_of(model) if order == "ddp" else full_adapter_of(model)
    return losses, adapter


def one_plain_process():
    model = net.adapt("float32").train()
    return net.train(model, loss_of=own_loss), net.adapter_of(model)


@pytest.mark.parametrize(
    ("order", "level"),
    [("lean first", 3), *(("sharded first", level) for level in (1, 2, 3)), ("ddp", 3)],
)
def test_trains_as_one_plain_process(pair, order, level):
    results = pair.run(train_lean, order, level)
    net.assert_equal_to_one(results, one_plain_process(), atol=1e-4)
