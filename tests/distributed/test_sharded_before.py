"""Weights that are sharded already when the model is adapted: refused, and nothing is changed."""

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


def refused(how):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh, model = init_device_mesh("cpu", (2,)), Net()
    if how == "tensor parallel":
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        model = parallelize_module(model, mesh, plan)
    else:
        fully_shard(model, mesh=mesh)
    before = {name: type(module) for name, module in model.named_modules()}
    try:
        get_peft_model(model, PacaConfig(r=2, target_modules=["up", "down"]))
    except ValueError as error:
        return str(error), before == {name: type(m) for name, m in model.named_modules()}
    return "", False


@pytest.mark.parametrize("how", ["tensor parallel", "FSDP2"])
def test_is_refused(pair, how):
    for message, is_unchanged in pair.run(refused, how):
        assert "weight of 'up' is sharded over several devices" in message
        assert "Adapt the model before `fully_shard`, and load it without `tp_plan`" in message
        assert is_unchanged
