"""Weights of tensor parallelism: refused when the model is adapted, and nothing is changed."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from pacatune import PacaConfig

pytestmark = pytest.mark.slow


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def refused(with_fsdp):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = parallelize_module(Net(), mesh["tensor"], plan)
    if with_fsdp:
        fully_shard(model, mesh=mesh["data"])
    before = {name: type(module) for name, module in model.named_modules()}
    try:
        get_peft_model(model, PacaConfig(r=2, target_modules=["up", "down"]))
    except ValueError as error:
        return str(error), before == {name: type(m) for name, m in model.named_modules()}
    return "", False


@pytest.mark.parametrize("with_fsdp", [False, True])
def test_is_refused(pair, with_fsdp):
    for message, is_unchanged in pair.run(refused, with_fsdp):
        assert "weight of 'up' is a part of one that several devices share" in message
        assert "load the model without `tp_plan`" in message
        assert is_unchanged
