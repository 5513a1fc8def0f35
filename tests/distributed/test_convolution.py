"""Adapted convolutions under DDP, FSDP1 and FSDP2: two processes train what one does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.distributed import net
from tests.distributed.partition import partition

pytestmark = pytest.mark.slow


class Cnn(nn.Module):
    """Without batch statistics, which each process would have its own of."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(16, 8, 1, groups=2)
        self.wave = nn.Conv1d(8, 5, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        x = F.silu(self.depthwise(F.silu(self.stem(x))))
        return self.wave(self.grouped(x).flatten(2)).mean(-1)


def adapt():
    from peft import get_peft_model

    from pacatune import PacaConfig

    torch.manual_seed(0)
    config = PacaConfig(r=3, paca_alpha=6, target_modules=["stem", "depthwise", "grouped", "wave"])
    return get_peft_model(Cnn().double(), config, autocast_adapter_dtype=False)


def train(model, part=net.whole):
    optimizer = torch.optim.AdamW(net.trained(model), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(net.NUM_STEPS):
        x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
        y = torch.randint(5, (4,), generator=generator)
        loss = F.cross_entropy(model(part(x)), part(y))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_ddp():
    model = adapt()
    before = net.frozen(model)
    losses = train(nn.parallel.DistributedDataParallel(model), net.half)
    return losses, net.adapter_of(model), net.is_unchanged(model, before)


def train_fsdp2():
    from torch.distributed.fsdp import fully_shard

    model = adapt()
    for layer in net.layers_of(model):
        fully_shard(layer)
    fully_shard(model)
    losses = train(model, net.half)
    full = {
        k: v.full_tensor() if hasattr(v, "full_tensor") else v
        for k, v in model.state_dict().items()
    }
    return losses, net.adapter_of(model, full), True


def train_fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    model = FullyShardedDataParallel(adapt(), use_orig_params=True, device_id=torch.device("cpu"))
    losses = train(model, net.half)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        return losses, net.adapter_of(model.module, model.state_dict()), True


@pytest.mark.parametrize("run", [train_ddp, train_fsdp1, train_fsdp2])
def test_losses_adapter_and_base(pair, run):
    model = adapt()
    one = train(model), net.adapter_of(model)
    results = pair.run(run)
    net.assert_equal_to_one(results, one)
    assert all(is_base_untouched for *_, is_base_untouched in results)


def test_weights_and_deltas_that_are_empty_between_their_passes():
    """ZeRO-3, imitated in one process."""
    model, twin = adapt(), adapt()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for one in (model, twin):
        with torch.no_grad():
            for number, delta in enumerate(net.trained(one)):
                delta.normal_(generator=torch.Generator().manual_seed(number))
    partition(model)
    outputs = [one(x) for one in (model, twin)]
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(*outputs)
    for ours, theirs in zip(net.trained(model), net.trained(twin), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
