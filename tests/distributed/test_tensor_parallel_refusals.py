"""What cannot be adapted in a tensor parallel model is refused, and nothing changes."""

import pytest
import torch
from torch import nn

from tests.distributed.tensor_parallel import (
    adapt,
    load,
    marks,
)

pytestmark = marks


def refused(folder, options):
    base = load(folder)
    before = {name: type(module) for name, module in base.named_modules()}
    try:
        adapt(base, **options)
    except ValueError as error:
        return str(error), before == {name: type(m) for name, m in base.named_modules()}
    return "", False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "'model.embed_tokens' shares its work .* its style is 'embedding_rowwise' and its "
            "module a Embedding. Supported are nn.Linear layers",
        ),
        (
            {"modules_to_save": ["lm_head"]},
            r"`modules_to_save` .*'lm_head' is split .*style 'colwise_gather_output'",
        ),
        ({"selection": "weight_norm"}, "choose columns before the model is sharded"),
    ],
)
def test_refusals_change_nothing(pair, save_base, options, message):
    import re

    for found, is_unchanged in pair.run(refused, save_base(), options):
        assert re.search(message, found)
        assert is_unchanged


def refused_experts(folder):
    try:
        adapt(load(folder), target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    except ValueError as error:
        return str(error)
    return ""


def test_experts_are_refused(pair, tmp_path):
    from tests.tuner import moe

    moe.build("mixtral", num_key_value_heads=2).save_pretrained(tmp_path)
    for message in pair.run(refused_experts, str(tmp_path)):
        assert "layers.0.mlp.experts.down_proj' shares its work" in message
        assert "it is inside 'model.layers.0.mlp.experts', whose style is 'moe_tp" in message


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def refused_by_hand(with_fsdp):
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
        adapt(model, r=2, target_modules=["up", "down"])
    except ValueError as error:
        return str(error), before == {name: type(m) for name, m in model.named_modules()}
    return "", False


@pytest.mark.parametrize("with_fsdp", [False, True])
def test_plans_of_torch_are_refused(pair, with_fsdp):
    for message, is_unchanged in pair.run(refused_by_hand, with_fsdp):
        assert "'up' shares its work" in message
        assert "it was split by something else than a plan of transformers >= 5.17" in message
        assert is_unchanged
