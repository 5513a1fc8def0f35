"""A model that tensor parallelism has split is refused, and nothing of it changes."""

import pytest
from peft import get_peft_model
from torch import nn

from pacatune import PacaConfig
from tests.distributed import net
from tests.releases import needs

pytestmark = pytest.mark.slow
MESSAGE = "split over several processes by tensor parallelism.*load the model without a `tp_plan`"


def refused(base, config):
    before = [(name, type(module)) for name, module in base.named_modules()]
    with pytest.raises(ValueError, match=MESSAGE):
        get_peft_model(base, config)
    assert before == [(name, type(module)) for name, module in base.named_modules()]


def refuse_plan(folder):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    plan = DistributedConfig(tp_plan="auto", tp_size=2)
    base = AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan)
    refused(base, PacaConfig(target_modules="all-linear"))


@needs("transformers", "5.17")
def test_a_plan_of_transformers(pair, tmp_path):
    net.build_base("float32").save_pretrained(tmp_path)
    pair.run(refuse_plan, str(tmp_path))


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
    refused(model, PacaConfig(r=2, target_modules=["0", "2"]))


@pytest.mark.parametrize("with_fsdp", [False, True])
def test_a_plan_of_torch(pair, with_fsdp):
    pair.run(refuse_by_hand, with_fsdp)
