"""FSDP2 (`fully_shard`): each process has half of the rows of every weight and of every delta."""

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import MixedPrecisionPolicy

from tests.distributed import net
from tests.distributed.ways import full_adapter_of, full_state_dict, shard, train_shards
from tests.releases import compiles_whole

pytestmark = pytest.mark.slow


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=net.batches()[0]).logits


ONE = ("dtype", "sizes")  # what one process is told as well
UNEVEN = {"sizes": tuple(net.UNEVEN.items())}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reshard": False},
        {"accumulation": 4},
        {"accumulation": 4, "reshard": False},
        UNEVEN,
        {"dtype": "float32"},
        *({"reentrant": one, "reshard": other} for one in (True, False) for other in (True, False)),
        pytest.param({"num_compiled": 2}, marks=compiles_whole),
        pytest.param({"num_compiled": 1}, marks=compiles_whole),
    ],
    ids=str,
)
def test_losses_adapter_and_shards(pair, options):
    one = net.one_process(**{name: options[name] for name in ONE if name in options})
    atol = 1e-5 if "dtype" in options else 1e-10
    net.assert_equal_to_one(pair.run(train_shards, **options), one, atol)


def train_on_smaller_shards():
    """Five steps where four processes hold halves between forward and backward."""
    model = shard(net.adapt(), 2)
    before = net.frozen(model)
    losses = net.train(model, part=net.half)
    return losses, full_adapter_of(model), net.is_unchanged(model, before)


def test_smaller_shards_between_forward_and_backward(four):
    """They are cut from the temporary that the columns are in; no weight is written after that."""
    net.assert_equal_to_one(four.run(train_on_smaller_shards))


def distance(result, exact):
    """Largest difference of the losses, and the size of the difference of the adapters."""
    losses = max(abs(a - b) for a, b in zip(result[0], exact[0], strict=True))
    squares = [(result[1][name] - exact[1][name]).double().square().sum() for name in exact[1]]
    return losses, float(sum(squares)) ** 0.5


def assert_as_exact_as_one_process(results):
    """Within the error that one process has in bfloat16."""
    mean = [sum(pair) / 2 for pair in zip(results[0][0], results[1][0], strict=True)]
    exact = net.one_process("float32", (), True)
    losses, adapter = distance((mean, results[0][1]), exact)
    losses_of_one, adapter_of_one = distance(net.one_process("bfloat16"), exact)
    assert losses <= 1.5 * losses_of_one
    assert adapter <= 1.5 * adapter_of_one


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("kind", ["policy", "base"])
def test_16_bits(pair, kind, reshard):
    """By a policy over weights in float32, or in a base of bfloat16; deltas are in float32."""
    options = {"dtype": "bfloat16"}
    if kind == "policy":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options = {"dtype": "float32", "rounded": True, "fsdp": {"mp_policy": policy}}
    results = pair.run(train_shards, reshard=reshard, **options)
    assert all(all(others) for _, _, *others in results)
    assert {tensor.dtype for tensor in results[0][1].values()} == {torch.float32, torch.int64}
    assert_as_exact_as_one_process(results)


def count_writes(reshard):
    model = shard(net.adapt(), reshard)
    layers = net.layers_of(model)
    batch = net.half(net.batches()[0])
    counts = []
    for _ in range(2):
        with net.counted_writes() as writes:
            net.loss_of(model, batch).backward()
        counts.append(len(writes) - len(layers))
    # Backward gathers every block anew, and all weights of a block are written together.
    assert counts == ([len(layers)] * 2 if reshard else [0, 0])
    assert not any(layer.residency.is_written for layer in layers)


@pytest.mark.parametrize("reshard", [True, False])
def test_columns_are_written_once_for_each_gathering(pair, reshard):
    pair.run(count_writes, reshard)


def hold_the_temporary():
    """Somebody holds what FSDP2 has gathered, and sees the pretrained values there."""
    model = shard(net.adapt(init_weights=False), False)
    batch = net.half(net.batches()[0])
    expected = net.loss_of(model, batch)
    expected.backward()
    gradients = [p.grad.full_tensor() for p in net.trained(model)]
    layer = net.layers_of(model)[0]
    model.zero_grad()
    for block in model.get_base_model().model.layers:
        block.unshard()
    held = layer.base_layer.weight.detach()
    before = held.clone()
    with net.counted_writes() as writes:
        loss = net.loss_of(model, batch)
        unchanged = torch.equal(held, before)
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    assert unchanged
    for parameter, gradient in zip(net.trained(model), gradients, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), gradient, rtol=1e-10, atol=1e-8)
    assert len(writes) == len(net.layers_of(model)) - 1


def test_nothing_is_written_into_a_temporary_that_somebody_holds(pair):
    pair.run(hold_the_temporary)


def train_under_checkpoint_wrappers():
    """FSDP's activation checkpointing of accelerate."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = net.adapt()
    blocks = model.get_base_model().model.layers
    for number, block in enumerate(blocks):
        blocks[number] = checkpoint_wrapper(block)
    shard(model)
    return net.train(model, part=net.half), full_adapter_of(model)


def shard_after_use():
    model = net.adapt()
    before = net.frozen(model)
    net.train(model)  # the columns are in the weights now
    shard(model)
    state_dict = full_state_dict(model)
    same = all(torch.equal(state_dict[name], before[name]) for name in before)
    return logits_of(model), same


def test_shards_are_cut_from_the_pretrained_weight(pair):
    one = net.adapt()
    net.train(one)
    for logits, same in pair.run(shard_after_use):
        assert same
        torch.testing.assert_close(logits, logits_of(one), rtol=0, atol=1e-10)


def train_with_reference_pass():
    """As DPO does: the base model's loss between forward and backward."""
    model, base = shard(net.adapt()), net.build_base()

    def loss_of(model, batch):
        loss = net.loss_of(model, net.half(batch))
        with torch.no_grad(), model.disable_adapter():
            reference, expected = net.loss_of(model, batch), net.loss_of(base, batch)
        torch.testing.assert_close(reference, expected, rtol=0, atol=1e-10)
        return loss

    return net.train(model, loss_of=loss_of), full_adapter_of(model)


def train_and_save(folder):
    model = shard(net.adapt("float32"))
    net.train(model, part=net.half)
    state_dict = full_state_dict(model)
    if torch.distributed.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state_dict)
    return logits_of(model)


def test_saved_adapter_in_one_process(pair, tmp_path):
    from peft import PeftModel

    logits = pair.run(train_and_save, str(tmp_path))[0]
    one = PeftModel.from_pretrained(net.build_base("float32"), tmp_path)
    torch.testing.assert_close(logits_of(one), logits, rtol=0, atol=1e-5)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 2 * len(net.layers_of(one))
    assert all(tensor.numel() for tensor in saved.values())


def load_into_shards(folder, how):
    from peft import set_peft_model_state_dict
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    model = shard(net.adapt("float32"))
    saved = load_file(f"{folder}/adapter_model.safetensors")
    if how == "peft":
        set_peft_model_state_dict(model, saved)
    else:
        one = net.adapt("float32")
        set_peft_model_state_dict(one, saved)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(model, one.state_dict(), options=options)
    return logits_of(model)


@pytest.mark.parametrize("how", ["peft", "torch"])
def test_adapter_of_one_process_in_shards(pair, tmp_path, how):
    one = net.adapt("float32")
    net.train(one)
    one.save_pretrained(tmp_path)
    for logits in pair.run(load_into_shards, str(tmp_path), how):
        torch.testing.assert_close(logits, logits_of(one), rtol=0, atol=1e-5)


def merge_shards():
    model = shard(net.adapt(init_weights=False))
    expected = logits_of(model)
    message = r"Cannot merge into a weight .* each process has a part"
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=message):
            merge()
    assert torch.equal(expected, logits_of(model))


def test_merging_shards_is_refused_and_changes_nothing(pair):
    pair.run(merge_shards)


def train_deltas_alone(which):
    """Sharded deltas over whole weights."""
    from torch.distributed.fsdp import fully_shard

    model = net.adapt()
    if which == "ignored weights":
        shard(model, ignored_params={p for p in model.parameters() if not p.requires_grad})
    else:
        for layer in net.layers_of(model):
            fully_shard(layer.paca_delta["default"])
    return net.train(model, part=net.half), full_adapter_of(model)


def train_whole_deltas():
    """FSDP knows nothing of what is adapted after it has sharded the base."""
    from peft import get_peft_model
    from torch.distributed.fsdp import fully_shard

    from pacatune import PacaConfig

    base = net.build_base()
    for block in base.model.layers:
        fully_shard(block)
    fully_shard(base)
    model = get_peft_model(base, PacaConfig(r=4, paca_alpha=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW(net.trained(model), lr=1e-2)

    def average(*_):
        for delta in net.trained(model):
            torch.distributed.all_reduce(delta.grad)
            delta.grad /= 2

    optimizer.register_step_pre_hook(average)
    return net.train(model, optimizer, part=net.half), net.adapter_of(model)


@pytest.mark.parametrize(
    ("train", "options"),
    [
        (train_under_checkpoint_wrappers, []),
        (train_with_reference_pass, []),
        (train_deltas_alone, ["ignored weights"]),
        (train_deltas_alone, ["holders"]),
        (train_whole_deltas, []),
    ],
)
def test_trains_as_one_process(pair, train, options):
    net.assert_equal_to_one(pair.run(train, *options))
