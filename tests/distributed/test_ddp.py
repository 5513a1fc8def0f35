"""DistributedDataParallel: each process has the whole model and half of each batch."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import net
from tests.distributed.ways import train_copies

pytestmark = pytest.mark.slow

UNSYNCHRONISED = {"broadcast_buffers": False}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ddp": {"gradient_as_bucket_view": True}},
        {"ddp": {"static_graph": True}},
        {"ddp": {"find_unused_parameters": True}},
        {"accumulation": 2},
        {"accumulation": 4, "ddp": UNSYNCHRONISED},
        {"accumulation": 2, "reentrant": True},
        {"accumulation": 2, "reentrant": False},
        {"dtype": "float32"},
    ],
    ids=str,
)
def test_losses_adapter_and_base(pair, options):
    one = net.one_process(options.get("dtype", "float64"))
    atol = 1e-5 if "dtype" in options else 1e-10
    net.assert_equal_to_one(pair.run(train_copies, **options), one, atol)


def two_forwards_before_one_backward():
    """The indices are buffers, and sent again in each forward: autograd must not mind."""

    def loss_of(wrapped, batch):
        return sum(net.loss_of(wrapped, net.half(ids)) for ids in batch.chunk(2)) / 2

    model = net.adapt()
    return net.train(DistributedDataParallel(model), loss_of=loss_of), net.adapter_of(model)


def train_from_other_starts():
    """The first process says where to start."""
    model = net.adapt()
    rank = torch.distributed.get_rank()
    with torch.no_grad():
        for delta in net.trained(model):
            delta.fill_(rank)
    net.loss_of(model, net.batches()[0])  # now the columns of this start are in the weights
    wrapped = DistributedDataParallel(model)
    return net.train(wrapped, part=net.half), net.adapter_of(model)


@pytest.mark.parametrize("train", [two_forwards_before_one_backward, train_from_other_starts])
def test_trains_as_one_process(pair, train):
    net.assert_equal_to_one(pair.run(train))
