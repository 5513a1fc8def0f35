"""Lean models in several processes."""

import pytest
import torch

from pacatune import lean
from tests.distributed import net
from tests.distributed.test_fsdp2 import full_adapter_of, shard

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
    optimizer = torch.optim.AdamW(net.trained(model), lr=1e-2)
    losses = []
    for batch in net.batches():
        loss = own_loss(wrapped, net.half(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    adapter = net.adapter_of(model) if order == "ddp" else full_adapter_of(model)
    lean.disable(model)
    names = {type(module).__name__ for module in model.modules()}
    return losses, adapter, sorted(names)


def one_plain_process():
    model = net.adapt("float32").train()
    optimizer = torch.optim.AdamW(net.trained(model), lr=1e-2)
    losses = []
    for batch in net.batches():
        loss = own_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, net.adapter_of(model)


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("order", ["lean first", "sharded first", "ddp"])
def test_trains_as_one_plain_process(pair, order, level):
    results = pair.run(train_lean, order, level)
    net.assert_equal_to_one(results, one_plain_process(), atol=1e-4)
