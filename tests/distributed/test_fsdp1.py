"""FullyShardedDataParallel (FSDP1): parameters are views into flat ones, modules are wrapped."""

import functools

import pytest
import torch

from tests.distributed import net

pytestmark = pytest.mark.slow


def wrap(model, policy, use_orig_params):
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    policies = {
        "blocks": functools.partial(ModuleWrapPolicy, {LlamaDecoderLayer}),
        # What transformers' Trainer takes: blocks, and in them each delta on its own.
        "peft": functools.partial(fsdp_auto_wrap_policy, model),
    }
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=policies[policy](),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )


def full_state(wrapped):
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    return FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT)


def train_flat(policy, use_orig_params):
    model = net.adapt()
    before = net.frozen(model)
    wrapped = wrap(model, policy, use_orig_params)
    losses = net.train(wrapped, part=net.half)
    with full_state(wrapped):
        state_dict = wrapped.state_dict()
    same_base = all(torch.equal(state_dict[name], before[name]) for name in before)
    return losses, net.adapter_of(model, state_dict), same_base


WRAPPINGS = [("blocks", True), ("peft", True), ("peft", False)]


@pytest.mark.parametrize(("policy", "use_orig_params"), WRAPPINGS)
def test_losses_adapter_and_base(pair, policy, use_orig_params):
    results = pair.run(train_flat, policy, use_orig_params)
    net.assert_equal_to_one(results)
    assert all(same_base for *_, same_base in results)


def load_flat(policy, use_orig_params, state_dict):
    wrapped = wrap(net.adapt(), policy, use_orig_params)
    with full_state(wrapped):
        # Not by set_peft_model_state_dict: PEFT 0.21 takes its keys for unknown ones and goes on.
        wrapped.load_state_dict(state_dict)
    with torch.no_grad():
        return wrapped(input_ids=net.batches()[0]).logits


@pytest.mark.parametrize(("policy", "use_orig_params"), WRAPPINGS)
def test_state_dict_of_one_process(pair, policy, use_orig_params):
    one = net.adapt()
    net.train(one)
    with torch.no_grad():
        expected = one(input_ids=net.batches()[0]).logits
    for logits in pair.run(load_flat, policy, use_orig_params, one.state_dict()):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
