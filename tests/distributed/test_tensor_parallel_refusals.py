"""What cannot be adapted in a tensor parallel model is refused, and nothing changes."""

import pytest
from torch import nn

from tests.distributed.tensor_parallel import adapt, load, marks
from tests.tuner import moe

pytestmark = marks


def refused(base, message, **options):
    before = [(name, type(module)) for name, module in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        adapt(base, **options)
    assert before == [(name, type(module)) for name, module in base.named_modules()]


def load_and_refuse(folder, message, options):
    refused(load(folder), message, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "'model.embed_tokens' shares .* 'embedding_rowwise' and its module a Embedding. S",
        ),
        (
            {"modules_to_save": ["lm_head"]},
            "`modules_to_save` .*'lm_head' is split .*'colwise_gather_output'",
        ),
        ({"selection": "weight_norm"}, "choose columns before the model is sharded"),
    ],
)
def test_refusals_change_nothing(pair, save_base, options, message):
    pair.run(load_and_refuse, save_base(), message, options)


def test_experts_are_refused(pair, tmp_path):
    moe.build("mixtral", num_key_value_heads=2).save_pretrained(tmp_path)
    options = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    message = (
        "layers.0.mlp.experts.down_proj' shares its work.*"
        "it is inside 'model.layers.0.mlp.experts', whose style is 'moe_tp"
    )
    pair.run(load_and_refuse, str(tmp_path), message, options)


def refuse_by_hand(with_fsdp):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    base = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(base, mesh["tensor"], plan)
    if with_fsdp:
        fully_shard(model, mesh=mesh["data"])
    message = "'0' shares its work.* split by something else than a plan of transformers >= 5.17"
    refused(model, message, r=2, target_modules=["0", "2"])


@pytest.mark.parametrize("with_fsdp", [False, True])
def test_plans_of_torch_are_refused(pair, with_fsdp):
    pair.run(refuse_by_hand, with_fsdp)
