"""The ways to train with two processes: copies (DDP), flat shards (FSDP1) and shards (FSDP2).

Each `train_` returns losses, the adapter, and whether the base is what it was.
"""

from contextlib import contextmanager

import torch

from tests.distributed import net


def train_copies(make=net.adapt, *, accumulation=1, reentrant=None, ddp=None, **options):
    model = make(**options)
    if reentrant is not None:
        net.checkpoint(model, use_reentrant=reentrant)
    before = net.frozen(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, **(ddp or {}))
    with net.counted_writes() as writes:
        losses = net.train(
            wrapped, accumulation=accumulation, part=net.half, no_sync=wrapped.no_sync
        )
    # R4, of the model whose layers are all linear.
    once = len(net.layers_of(model)) * net.NUM_STEPS
    is_seldom_written = once <= len(writes) <= 2 * once or make is not net.adapt
    return losses, net.adapter_of(model), net.is_unchanged(model, before), is_seldom_written


def wrap_flat(model, policy, use_orig_params):
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    block = type(model.get_base_model().model.layers[0])
    policies = {
        "blocks": ModuleWrapPolicy({block}),
        # What transformers' Trainer takes: blocks, and in them each delta on its own.
        "peft": fsdp_auto_wrap_policy(model),
    }
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=policies[policy],
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )


def full_state(wrapped):
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    return FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT)


def train_flat(make=net.adapt, *, policy, use_orig_params, **options):
    model = make(**options)
    before = net.frozen(model)
    wrapped = wrap_flat(model, policy, use_orig_params)
    losses = net.train(wrapped, part=net.half)
    with full_state(wrapped):
        state_dict = wrapped.state_dict()
    same_base = all(torch.equal(state_dict[name], before[name]) for name in before)
    return losses, net.adapter_of(model, state_dict), same_base


WRAPPINGS = [
    {"policy": policy, "use_orig_params": is_original}
    for policy, is_original in (("blocks", True), ("peft", True), ("peft", False))
]


def shard(model, reshard_after_forward=True, **options):
    from torch.distributed.fsdp import fully_shard

    options["reshard_after_forward"] = reshard_after_forward
    for block in model.get_base_model().model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def full_state_dict(model):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def full_adapter_of(model):
    return net.adapter_of(model, full_state_dict(model))


def train_shards(
    make=net.adapt,
    *,
    accumulation=1,
    reshard=True,
    reentrant=None,
    fsdp=None,
    num_compiled=0,
    **options,
):
    @contextmanager
    def no_sync():
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    model = make(**options)
    if reentrant is not None:
        net.checkpoint(model, use_reentrant=reentrant)
    shard(model, reshard, **(fsdp or {}))
    before = net.frozen(model)
    for block in model.get_base_model().model.layers[:num_compiled]:
        block.compile(backend="aot_eager")
    with net.counted_writes() as writes:
        losses = net.train(model, accumulation=accumulation, part=net.half, no_sync=no_sync)
    is_written = len(writes) > 0 or make is not net.adapt
    return losses, full_adapter_of(model), net.is_unchanged(model, before), is_written
