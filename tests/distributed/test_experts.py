"""Adapted experts, attention and embeddings in two processes: DDP, FSDP1 and FSDP2."""

import functools

import pytest
import torch
from torch import nn

from tests.distributed import net
from tests.distributed.test_fsdp1 import WRAPPINGS, full_state
from tests.distributed.test_fsdp2 import full_adapter_of, shard
from tests.tuner import moe

pytestmark = pytest.mark.slow

KINDS = ["mixtral", "gpt_oss", "llama4", "encoder"]


class Encoder(nn.Module):
    """Blocks with nn.MultiheadAttention over an embedding, called as a language model is."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed = nn.Embedding(net.VOCAB_SIZE, 12)
        blocks = [nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=True) for _ in range(2)]
        self.model.layers = nn.ModuleList(blocks)
        self.head = nn.Linear(12, net.VOCAB_SIZE)

    def forward(self, input_ids):
        from transformers.modeling_outputs import CausalLMOutput

        x = self.model.embed(input_ids)
        for block in self.model.layers:
            x = block(x)
        return CausalLMOutput(logits=self.head(x))


def adapt(kind):
    if kind != "encoder":
        return moe.adapt(moe.build(kind), random=False)
    torch.manual_seed(0)
    targets = ["embed", "self_attn", "out_proj"]
    return moe.adapt(
        Encoder().double(), random=False, target_modules=targets, target_parameters=None
    )


@functools.cache
def train_one(kind):
    model = adapt(kind)
    return net.train(model), net.adapter_of(model)


def train_copies(kind):
    model = adapt(kind)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    return net.train(wrapped, part=net.half), net.adapter_of(model)


@pytest.mark.parametrize("kind", KINDS)
def test_ddp(pair, kind):
    net.assert_equal_to_one(pair.run(train_copies, kind), train_one(kind), atol=1e-5)


def train_shards(kind, reentrant):
    model = adapt(kind)
    if reentrant is not None:
        net.checkpoint(model, use_reentrant=reentrant)
    shard(model)
    before = net.frozen(model)
    losses = net.train(model, part=net.half)
    return losses, full_adapter_of(model), net.is_unchanged(model, before)


@pytest.mark.parametrize(
    ("kind", "reentrant"),
    [(kind, None) for kind in KINDS] + [("mixtral", True), ("mixtral", False), ("gpt_oss", True)],
)
def test_fsdp2(pair, kind, reentrant):
    results = pair.run(train_shards, kind, reentrant)
    net.assert_equal_to_one(results, train_one(kind), atol=1e-5)
    assert all(same_shards for *_, same_shards in results)


def train_flat(kind, policy, use_orig_params):
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model = adapt(kind)
    before = net.frozen(model)
    block = type(model.get_base_model().model.layers[0])
    policies = {"blocks": ModuleWrapPolicy({block}), "peft": fsdp_auto_wrap_policy(model)}
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=policies[policy],
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )
    losses = net.train(wrapped, part=net.half)
    with full_state(wrapped):
        state_dict = wrapped.state_dict()
    same_base = all(torch.equal(state_dict[name], before[name]) for name in before)
    return losses, net.adapter_of(model, state_dict), same_base


@pytest.mark.parametrize(
    ("kind", "policy", "use_orig_params"),
    [*[("mixtral", *one) for one in WRAPPINGS], *[(kind, "peft", False) for kind in KINDS[1:]]],
)
def test_fsdp1(pair, kind, policy, use_orig_params):
    results = pair.run(train_flat, kind, policy, use_orig_params)
    net.assert_equal_to_one(results, train_one(kind), atol=1e-5)
    assert all(same_base for *_, same_base in results)
