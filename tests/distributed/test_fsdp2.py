"""FSDP2 (`fully_shard`): each process has half of the rows of every weight and of every delta."""

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import net
from tests.releases import compiles_whole

pytestmark = pytest.mark.slow


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


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=net.batches()[0]).logits


def train_shards(dtype="float64", sizes=(), rounded=False, reshard=True, reentrant=None, groups=1):
    model = net.adapt(dtype, sizes, rounded, groups=groups)
    if reentrant is not None:
        net.checkpoint(model, use_reentrant=reentrant)
    shard(model, reshard)
    before = net.frozen(model)
    with net.counted_writes() as writes:
        losses = net.train(model, part=net.half)
    same_shards = net.is_unchanged(model, before)
    return losses, full_adapter_of(model), same_shards and len(writes) > 0


@pytest.mark.parametrize("reshard", [True, False])
def test_losses_adapter_and_shards(pair, reshard):
    results = pair.run(train_shards, "float64", (), False, reshard)
    net.assert_equal_to_one(results)
    assert all(same_shards for *_, same_shards in results)


@pytest.mark.parametrize("reshard", [True, False])
def test_row_groups(pair, reshard):
    results = pair.run(train_shards, "float64", (), False, reshard, None, 4)
    net.assert_equal_to_one(results, net.one_process(groups=4))
    assert all(same_shards for *_, same_shards in results)


def train_on_smaller_shards(dtype):
    """Five steps where four processes hold halves between forward and backward."""
    model = shard(net.adapt(dtype), 2)
    before = net.frozen(model)
    losses = net.train(model, part=net.half)
    same = net.is_unchanged(model, before)
    whole = full_state_dict(model)
    one = net.adapt(dtype).state_dict()
    same &= all(torch.equal(whole[name], one[name]) for name in one if "base_layer" in name)
    return losses, full_adapter_of(model), same


def test_smaller_shards_between_forward_and_backward(four):
    """They are cut from the temporary that the columns are in; no weight is written after that."""
    results = four.run(train_on_smaller_shards, "float64")
    net.assert_equal_to_one(results)
    assert all(same for *_, same in results)


def train_in_mixed_precision(reshard):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(net.adapt("float32", (), True), reshard, mp_policy=policy)
    before = net.frozen(model)
    with net.counted_writes() as writes:
        losses = net.train(model, part=net.half)
    same = net.is_unchanged(model, before)
    return losses, full_adapter_of(model), same and len(writes) > 0


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
def test_mixed_precision_policy(pair, reshard):
    results = pair.run(train_in_mixed_precision, reshard)
    assert all(same for *_, same in results)
    assert_as_exact_as_one_process(results)


def train_compiled_shards(groups, num_blocks):
    model = shard(net.adapt(groups=groups))
    before = net.frozen(model)
    for block in model.get_base_model().model.layers[:num_blocks]:
        block.compile(backend="aot_eager")
    with net.counted_writes() as writes:
        losses = net.train(model, part=net.half)
    same = net.is_unchanged(model, before)
    return losses, full_adapter_of(model), same and len(writes) > 0


@compiles_whole
@pytest.mark.parametrize(("groups", "num_blocks"), [(1, 2), (4, 1)])
def test_compiled_blocks(pair, groups, num_blocks):
    results = pair.run(train_compiled_shards, groups, num_blocks)
    net.assert_equal_to_one(results, net.one_process(groups=groups))
    assert all(same for *_, same in results)


def count_writes(reshard):
    model = shard(net.adapt(), reshard)
    layers = net.layers_of(model)
    batch = net.half(net.batches()[0])
    counts = []
    for _ in range(2):
        with net.counted_writes() as writes:
            net.loss_of(model, batch).backward()
        counts.append(len(writes) - len(layers))
    return counts, len(layers), [layer.residency.is_written for layer in layers]


@pytest.mark.parametrize("reshard", [True, False])
def test_columns_are_written_once_for_each_gathering(pair, reshard):
    for counts, num_layers, are_written in pair.run(count_writes, reshard):
        # Backward gathers every block anew, and all weights of a block are written together.
        assert counts == ([num_layers] * 2 if reshard else [0, 0])
        assert not any(are_written)


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
    same = [
        torch.allclose(p.grad.full_tensor(), g, rtol=1e-10)
        for p, g in zip(net.trained(model), gradients, strict=True)
    ]
    return (
        loss.item() - expected.item(),
        unchanged,
        all(same),
        len(writes),
        len(net.layers_of(model)),
    )


def test_nothing_is_written_into_a_temporary_that_somebody_holds(pair):
    for difference, unchanged, same_gradients, num_writes, num_layers in pair.run(
        hold_the_temporary
    ):
        assert abs(difference) < 1e-12
        assert unchanged
        assert same_gradients
        assert num_writes == num_layers - 1


def test_float32(pair):
    results = pair.run(train_shards, "float32")
    net.assert_equal_to_one(results, net.one_process("float32"), atol=1e-5)
    assert all(same_shards for *_, same_shards in results)


@pytest.mark.parametrize("reshard", [True, False])
def test_bfloat16_base_with_float32_deltas(pair, reshard):
    results = pair.run(train_shards, "bfloat16", (), False, reshard)
    assert all(same_shards for *_, same_shards in results)
    assert {tensor.dtype for tensor in results[0][1].values()} == {torch.float32, torch.int64}
    assert_as_exact_as_one_process(results)


def test_out_features_that_cannot_be_halved(pair):
    sizes = tuple(net.UNEVEN.items())
    results = pair.run(train_shards, "float64", sizes)
    net.assert_equal_to_one(results, net.one_process("float64", sizes))
    assert all(same_shards for *_, same_shards in results)


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(pair, reentrant, reshard):
    results = pair.run(train_shards, "float64", (), False, reshard, reentrant)
    net.assert_equal_to_one(results)


def train_under_checkpoint_wrappers():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = net.adapt()
    blocks = model.get_base_model().model.layers
    for number, block in enumerate(blocks):
        blocks[number] = checkpoint_wrapper(block)
    shard(model)
    return net.train(model, part=net.half), full_adapter_of(model)


def test_fsdp_activation_checkpointing_of_accelerate(pair):
    net.assert_equal_to_one(pair.run(train_under_checkpoint_wrappers))


def train_without_sync(reshard):
    from contextlib import contextmanager

    model = shard(net.adapt(), reshard)

    @contextmanager
    def no_sync():
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    losses = net.train(model, accumulation=4, part=net.half, no_sync=no_sync)
    return losses, full_adapter_of(model)


@pytest.mark.parametrize("reshard", [True, False])
def test_accumulation_without_sync(pair, reshard):
    net.assert_equal_to_one(pair.run(train_without_sync, reshard))


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
    """As DPO does: the base model's logits between forward and backward."""
    model = shard(net.adapt())
    optimizer = torch.optim.AdamW(net.trained(model), lr=1e-2)
    losses, references = [], []
    for batch in net.batches():
        loss = net.loss_of(model, net.half(batch))
        with torch.no_grad(), model.disable_adapter():
            references.append(net.loss_of(model, batch).item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, full_adapter_of(model), references


def test_reference_pass_between_forward_and_backward(pair):
    results = pair.run(train_with_reference_pass)
    net.assert_equal_to_one(results)
    base = net.build_base()
    with torch.no_grad():
        expected = [net.loss_of(base, batch).item() for batch in net.batches()]
    for *_, references in results:
        assert references == pytest.approx(expected, rel=0, abs=1e-10)


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
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match=r"Cannot merge into a weight .* each process has a part"
        ):
            merge()
    return expected, logits_of(model)


def test_merging_shards_is_refused_and_changes_nothing(pair):
    for expected, logits in pair.run(merge_shards):
        assert torch.equal(expected, logits)


def train_deltas_alone(which):
    from torch.distributed.fsdp import fully_shard

    model = net.adapt()
    if which == "ignored weights":
        shard(model, ignored_params={p for p in model.parameters() if not p.requires_grad})
    else:
        for layer in net.layers_of(model):
            fully_shard(layer.paca_delta["default"])
    return net.train(model, part=net.half), full_adapter_of(model)


@pytest.mark.parametrize("which", ["ignored weights", "holders"])
def test_sharded_deltas_over_whole_weights(pair, which):
    net.assert_equal_to_one(pair.run(train_deltas_alone, which))


def adapt_shards(mesh_dim_names):
    from peft import get_peft_model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from pacatune import PacaConfig

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=mesh_dim_names)
    base = net.build_base()
    for block in base.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(base, mesh=mesh)
    model = get_peft_model(base, PacaConfig(r=4, paca_alpha=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW(net.trained(model), lr=1e-2)
    losses = []
    for batch in net.batches():
        loss = net.loss_of(model, net.half(batch))
        loss.backward()
        for delta in net.trained(model):  # FSDP knows nothing of these
            torch.distributed.all_reduce(delta.grad, torch.distributed.ReduceOp.SUM)
            delta.grad /= 2
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, net.adapter_of(model)


@pytest.mark.parametrize("mesh_dim_names", [None, ("data",)])
def test_whole_deltas_over_sharded_weights(pair, mesh_dim_names):
    net.assert_equal_to_one(pair.run(adapt_shards, mesh_dim_names))
