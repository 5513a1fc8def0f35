"""DeepSpeed ZeRO, where it can be built."""

import os
import sys
from functools import partial

import pytest
import torch

from tests.distributed import net, test_kinds, zero
from tests.distributed.pair import Pair


@pytest.fixture(scope="module")
def deepspeed_pairs(tmp_path_factory):
    """Pairs of processes that import DeepSpeed."""
    environment = zero.build()
    pairs = []

    def get():
        if not pairs or not pairs[-1].is_alive:
            prepare = partial(see_deepspeed, environment)
            pairs.append(Pair(tmp_path_factory.mktemp("pair"), prepare=prepare))
        return pairs[-1]

    yield get
    for pair in pairs:
        pair.close()


def see_deepspeed(environment):
    os.environ.update(environment)
    sys.path.append(str(zero.FOLDER))


@pytest.fixture
def pair(deepspeed_pairs):
    return deepspeed_pairs()


DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def configure(stage, accumulation=1):
    import deepspeed

    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_scatter": False}
    return {**DEEPSPEED, "zero_optimization": zero, "gradient_accumulation_steps": accumulation}


def train_engine(model, config):
    import deepspeed

    accumulation = config["gradient_accumulation_steps"]
    optimizer = torch.optim.AdamW(net.trained(model), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for batch in net.batches():
        losses.append(0.0)
        for ids in batch.chunk(accumulation):
            loss = net.loss_of(engine, net.half(ids))
            engine.backward(loss)
            engine.step()
            losses[-1] += loss.item() / accumulation
    return engine, losses


def whole_adapter_and_base(model):
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return net.adapter_of(model), net.frozen(model)


def build(kind):
    return net.adapt("float32") if kind == "llama" else test_kinds.adapt(kind).float()


def train_zero(stage, kind, accumulation=1, reentrant=None, is_used=False):
    model = build(kind)
    before = net.frozen(model)
    if reentrant is not None:
        net.checkpoint(model, use_reentrant=reentrant)
    if is_used:  # with columns in the weights
        net.loss_of(model, net.batches()[0]).backward()
        model.zero_grad()
    with net.counted_writes() as writes:
        _, losses = train_engine(model, configure(stage, accumulation))
    is_left_alone = stage < 3 or is_used or not writes
    adapter, after = whole_adapter_and_base(model)
    is_same = all(torch.equal(before[name], after[name]) for name in before)
    return losses, adapter, is_same, is_left_alone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kind", "options"),
    [
        (1, "llama", {"accumulation": 2}),
        (2, "llama", {}),
        (3, "llama", {}),
        (3, "llama", {"accumulation": 2}),
        (3, "llama", {"reentrant": True}),
        (3, "llama", {"reentrant": False}),
        (3, "llama", {"is_used": True}),
        (3, "convolutions", {}),
    ],
)
def test_losses_and_adapter(pair, stage, kind, options):
    model = build(kind)
    one = net.train(model), net.adapter_of(model)
    net.assert_equal_to_one(pair.run(train_zero, stage, kind, **options), one, atol=1e-5)


@torch.no_grad()
def build_partitioned_base(config):
    """Partition each weight where it is made, as from_pretrained does."""
    import deepspeed

    plain = net.build_base("float32")
    with deepspeed.zero.Init(config_dict_or_path=config):
        base = net.build_base("float32", (("pad_token_id", None),))
    for buffer, value in zip(base.buffers(), plain.buffers(), strict=True):
        buffer.copy_(value)  # zero.Init rounds them
    with deepspeed.zero.GatheredParameters(list(base.parameters()), modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            for parameter, value in zip(base.parameters(), plain.parameters(), strict=True):
                parameter.copy_(value)
    return base


def adapt_partitioned_and_save(folder):
    from peft import get_peft_model

    from pacatune import PacaConfig

    config = configure(3)
    base = build_partitioned_base(config)
    assert all(parameter.numel() == 0 for parameter in base.parameters())
    model = get_peft_model(base, PacaConfig(r=4, paca_alpha=8, target_modules="all-linear"))
    engine, losses = train_engine(model, config)
    state_dict = engine._zero3_consolidated_16bit_state_dict()
    if torch.distributed.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state_dict)
    return losses, *whole_adapter_and_base(model)


@pytest.mark.slow
def test_weights_partitioned_before_they_are_adapted(pair, tmp_path):
    from peft import PeftModel

    results = pair.run(adapt_partitioned_and_save, str(tmp_path))
    net.assert_equal_to_one(results, net.one_process("float32"), atol=1e-5)
    one = PeftModel.from_pretrained(net.build_base("float32"), tmp_path)
    saved = net.adapter_of(one)
    assert all(torch.equal(saved[name], tensor) for name, tensor in results[0][1].items())


def sync_columns(stage, channels):
    from peft import set_peft_model_state_dict

    from pacatune.sync import ColumnReceiver, ColumnSource

    model = net.adapt("float32", channels=channels)
    source, server = ColumnSource(model), net.build_base("float32")
    receiver = ColumnReceiver(server)
    train_engine(model, configure(stage))
    if stage == 3:
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        source = ColumnSource(model)
    for _ in range(2):
        receiver.apply(source.columns())
    one = net.adapt("float32", channels=channels)
    set_peft_model_state_dict(one, whole_adapter_and_base(model)[0])
    expected = one.merge_and_unload().state_dict()
    return all(torch.equal(tensor, expected[k]) for k, tensor in server.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "channels"), [(2, None), (3, None), (3, 9)])
def test_columns_for_a_server(pair, stage, channels):
    assert pair.run(sync_columns, stage, channels) == [True, True]


def test_empty_adapter_is_not_saved(tmp_path):
    model = net.adapt()
    for delta in net.trained(model):
        delta.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"q_proj.paca_delta.* is empty.*GatheredParameters"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
