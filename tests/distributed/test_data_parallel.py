"""nn.DataParallel copies the modules' dictionaries into replicas in each step, in one process."""

import importlib

import pytest
import torch

from tests.distributed import net

# The package has a function of the same name.
replicating = importlib.import_module("torch.nn.parallel.replicate")


@pytest.fixture
def replicate(monkeypatch):
    """torch's replicate, with what needs GPUs done on the CPU: the first replica gets the tensors
    themselves, the others copies that pass gradients back."""

    def broadcast(tensors, devices, detach=False):
        return [list(tensors), *([t.clone() for t in tensors] for _ in devices[1:])]

    monkeypatch.setattr(replicating, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(replicating, "_get_device_index", lambda device, *_: device)
    return lambda model: replicating.replicate(model, [0, 1])


@pytest.fixture
def writes():
    with net.counted_writes() as addresses:
        yield addresses


def test_replicas_write_no_weight_and_give_the_gradients(replicate, writes):
    def loss_of(model, batch):
        parts = zip(replicate(model), batch.chunk(2), strict=True)
        return sum(net.loss_of(replica, ids) for replica, ids in parts) / 2

    model = net.adapt()
    before = net.frozen(model)
    losses = net.train(model, loss_of=loss_of)
    assert not writes
    result = losses, net.adapter_of(model), net.is_unchanged(model, before)
    net.assert_equal_to_one([result])


def test_replicas_of_a_model_whose_columns_are_written(replicate, writes):
    model = net.adapt(init_weights=False)
    ids = net.batches()[0]
    expected = model(input_ids=ids).logits.detach()
    assert len(set(writes)) == len(net.layers_of(model))
    with torch.no_grad():
        for replica in replicate(model):
            torch.testing.assert_close(replica(input_ids=ids).logits, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=0)
