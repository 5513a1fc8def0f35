"""R7: what is served is what a merge writes, to the last bit; all in one process."""

import itertools
import subprocess
import sys

import pytest
import torch

from pacatune import PacaConfig
from pacatune.patch.memory import Place
from pacatune.sync import ColumnReceiver, ColumnSource
from pacatune.sync.message import from_wire, to_wire
from pacatune.tuner.quantized import dequantized
from tests.conftest import build_model
from tests.distributed import net
from tests.sync.conftest import (
    VOCABULARY,
    adapt,
    assert_bits,
    bring,
    change,
    clone,
    in_few_bits,
    merged,
    nudge,
    served,
    step,
    two_layers,
)


@pytest.mark.parametrize(
    ("trained", "dtype"),
    [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None)],
)
def test_server_has_the_bits_of_a_merge_after_every_step(trained, dtype):
    model = adapt(trained)
    server = served(dtype or trained)
    before, held = clone(server), dict(server.named_parameters())
    source, receiver = ColumnSource(model, dtype), ColumnReceiver(server)
    receiver.expect(source.positions())
    optimizer = torch.optim.AdamW(net.trained(model), lr=1e-2)
    num_bytes = 4 * sum(one.out_features for one in net.layers_of(model)) * server.dtype.itemsize
    for number in range(1, 4):
        step(model, optimizer, number)
        columns = source.columns()
        assert columns.number == number
        assert (columns.num_bytes, columns.since) == (num_bytes, 0)
        assert receiver.apply(columns)
        assert_bits(server, merged(model, dtype))
        assert not receiver.apply(columns)  # once is enough
    assert receiver.number == 3
    receiver.revert()
    assert_bits(server, before)
    assert all(parameter is held[name] for name, parameter in server.named_parameters())


def test_the_source_neither_writes_nor_looks(model, source):
    """R4: no column write beyond those of training."""
    optimizer = torch.optim.AdamW(net.trained(model), lr=1e-2)
    step(model, optimizer)
    with net.counted_writes() as writes:
        step(model, optimizer, 1)
        alone = len(writes)
        step(model, optimizer, 2)
        source.columns()
        step(model, optimizer, 3)
        source.columns()
    assert alone > 0
    assert len(writes) == 3 * alone


def test_the_source_reads_the_columns_of_stale_weights(model, sync):
    """R1: after a step the weights hold the columns before it."""
    step(model)
    net.loss_of(model, net.batches()[0]).backward()
    assert all(layer.residency.is_written for layer in net.layers_of(model))
    for parameter in net.trained(model):
        parameter.data.add_(0.01)
    sync()


def test_only_what_was_changed_is_sent(model, server, source, receiver, sync):
    step(model)
    receiver.apply(source.columns())
    nothing = source.columns()
    assert (nothing.num_bytes, nothing.since) == (0, 1)
    assert receiver.apply(nothing)
    change(model, 3)
    some = source.columns()
    assert list(some.by_name(source.positions())) == [source.positions().sets[3].name]
    assert receiver.apply(some)
    assert_bits(server, merged(model))
    net.layers_of(model)[3].scaling["default"] *= 0.5
    sync()


def test_fused_optimizers_and_data_edits_are_noticed(model, source, receiver, sync):
    receiver.apply(source.columns())
    step(model, torch.optim.AdamW(net.trained(model), lr=1e-2, fused=True))
    sync()
    held = net.layers_of(model)[0].delta_of("default").data
    held += 1
    receiver.apply(source.columns())
    held += 1
    sync()


def test_a_changed_base_is_sent(model, server, source, receiver):
    receiver.apply(source.columns())
    state = {name: 2 * one for name, one in model.state_dict().items() if "base_layer" in name}
    model.load_state_dict(state, strict=False)
    receiver.apply(source.columns())
    expected = merged(model)
    for one in source.positions().sets:
        columns = server.get_parameter(one.name).index_select(one.dim, one.indices)
        assert torch.equal(columns, expected[one.name].index_select(one.dim, one.indices)), one.name


def test_switched_off_adapters_send_the_base(model, server, source, receiver, sync):
    before = clone(server)
    step(model)
    receiver.apply(source.columns())
    with model.disable_adapter():
        receiver.apply(source.columns())
        assert_bits(server, before)
        assert source.columns().num_bytes == 0
        receiver.check_base(source.base_columns())  # which is no sync that it would have missed
        assert receiver.apply(source.columns())
    sync()
    receiver.apply(source.base_columns())
    assert_bits(server, before)
    sync()


def test_a_missed_sync_is_refused_and_mended(model, server, source, receiver):
    receiver.apply(source.columns())
    nudge(model, 0)
    missed, last = from_wire(*to_wire(source.columns())), source.columns()
    before = clone(server)
    with pytest.raises(ValueError, match=r"since sync 2, and the weights hold sync 1; ask for"):
        receiver.apply(last)
    with pytest.raises(ValueError, match=r"follows a sync which is not here; call `source\.forget"):
        missed.by_name(source.positions())
    assert_bits(server, before)
    assert receiver.apply(source.columns(everything=True))
    assert_bits(server, merged(model))


def test_another_adapter_and_other_columns(model, server, source, receiver):
    before = clone(server)
    first = source.positions().version
    step(model)
    receiver.apply(source.columns())
    model.add_adapter("other", PacaConfig(r=3, random_seed=7, target_modules=["q_proj", "up_proj"]))
    model.set_adapter("other")
    step(model)
    second = source.positions()
    assert second.version != first
    assert len(second.sets) == 4
    with pytest.raises(ValueError, match=r"belong to positions .*; send `source.positions\(\)`"):
        receiver.apply(source.columns())
    receiver.expect(second)
    assert receiver.number == 1  # still served
    receiver.apply(source.columns(everything=True))
    assert_bits(server, merged(model))
    layer = net.layers_of(model)[0]
    layer.replace_update("other", torch.ones(layer.out_features, 3), torch.tensor([0, 5, 9]), 6.0)
    bring(source, receiver)
    assert_bits(server, merged(model))
    with torch.no_grad():  # as load_state_dict does
        layer.paca_indices["other"].copy_(torch.tensor([1, 5, 9]))
    bring(source, receiver)
    expected = layer.get_base_layer().weight[:, [1, 5, 9]] + 2
    assert torch.equal(server.model.layers[0].self_attn.q_proj.weight[:, [1, 5, 9]], expected)
    model.set_adapter("default")
    assert source.positions().version == first
    bring(source, receiver)
    assert_bits(server, merged(model))
    receiver.revert()
    assert_bits(server, before)


def test_an_adapter_by_its_name(model, server):
    model.add_adapter("other", PacaConfig(r=3, target_modules=["q_proj"], init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"2 adapters are active \(default, other\)"):
        ColumnSource(model)
    with pytest.raises(ValueError, match="no layer has an adapter 'missing' of PaCA"):
        ColumnSource(model, adapter="missing")
    bring(ColumnSource(model, adapter="other"), ColumnReceiver(server))
    model.set_adapter("other")
    assert_bits(server, merged(model))


def test_the_base_is_compared(source, receiver):
    receiver.check_base(source.base_columns())
    receiver.apply(source.columns())
    receiver.check_base(source.base_columns())
    other, one = served(), source.positions().sets[2]
    with torch.no_grad():
        other.get_parameter(one.name)[1, one.indices[1]] += 1
    receiver = ColumnReceiver(other)
    receiver.expect(source.positions())
    with pytest.raises(ValueError, match=rf"1 of 14 tensors, first '{one.name}', are not"):
        receiver.check_base(source.base_columns())


def test_an_interrupted_sync_is_taken_back(model, server, source, receiver, monkeypatch):
    step(model)
    receiver.apply(source.columns())
    before = clone(server)
    step(model, seed=1)
    columns, write, calls = source.columns(), Place.write, itertools.count()

    def interrupted(place, values):
        if next(calls) == 5:
            write(place, values.roll(1, 0))
            raise KeyboardInterrupt
        write(place, values)

    with monkeypatch.context() as patched:
        patched.setattr(Place, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            receiver.apply(columns)
    assert_bits(server, before)
    assert receiver.number == 1
    assert receiver.apply(columns)
    assert_bits(server, merged(model))


# Messages.


INFINITE = float("inf")
SET = {"name": "a", "parameter": "a", "dim": 1, "num_columns": 1, "dtype": "float32"}


def whole(buffer):
    return buffer


@pytest.mark.parametrize(
    ("kind", "changes", "damage", "message"),
    [
        ("columns", {"ordinals": [14]}, whole, "beyond the 14 known"),
        ("columns", {"ordinals": [0, 0]}, whole, "or one twice"),
        ("columns", {"ordinals": [0], "since": 0}, whole, "are of 1 tensors, not of all 14"),
        ("columns", {}, lambda buffer: buffer[:-1], r"must be \d+ bytes, got .* is damaged"),
        ("positions", {"kind": "columns"}, whole, "no message of a ColumnSource .KeyError"),
        ("positions", {"sets": [{**SET, "shape": [INFINITE]}]}, whole, "Source .Overflow"),
        ("positions", {"sets": []}, lambda buffer: buffer[:0], "`sets` is empty"),
        ("positions", {"shapes": {"a": [-1]}}, whole, "`shapes` has a negative size"),
        ("positions", {}, lambda buffer: buffer.view(torch.int64), "buffer is .* of torch.int64"),
        ("positions", {}, lambda buffer: buffer[:-8], "has 55 column numbers, and names 56"),
        ("positions", {}, lambda buffer: buffer.repeat(2), "has 112 column numbers, and names 56"),
        ("positions", {}, lambda buffer: buffer.flip(0), "`indices` holds .* must be sorted"),
    ],
)
def test_messages_of_strangers(source, kind, changes, damage, message):
    words, buffer = to_wire(source.positions() if kind == "positions" else source.columns())
    with pytest.raises(ValueError, match=message):
        from_wire(words | changes, damage(buffer)).by_name(source.positions())


# Models that cannot send or receive.


def test_a_server_needs_no_peft():
    """Nor who patches a model in memory."""
    code = (
        "import sys\n"
        "from pacatune.patch import apply, load, revert\n"
        "from pacatune.sync import ColumnReceiver, File, InProcess\n"
        "assert not {'peft', 'transformers', 'accelerate'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def adapt_tied():
    base = build_model(VOCABULARY, tie_word_embeddings=True)
    return adapt(base=base, target_modules=["lm_head"])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (served, "has no PaCA layers; adapt it first"),
        (lambda: in_few_bits("bitsandbytes-int8"), r"'0.weight' is quantised \(bnb 8bit\), and tr"),
        (lambda: adapt(modules_to_save=["lm_head"]), r"also trains .*lm_head.*, which is no"),
        (adapt_tied, "'lm_head.weight' is tied to another module"),
    ],
)
def test_models_without_columns_to_send(build, message):
    with pytest.raises(ValueError, match=message):
        ColumnSource(build())


def test_a_trainer_in_4_bits_beside_a_sampler_in_16():
    """Whose base is what training dequantises; then it computes what the training pass does."""
    trainer = in_few_bits("bitsandbytes-nf4")
    for number in range(2):
        change(trainer, number, by=0.01 * (1 + number))
    sampler = two_layers()
    for layer in net.layers_of(trainer):
        own = sampler[0 if layer is trainer.base_model.model[0] else 2]
        own.weight.data = dequantized(layer.quantization_backend, layer.base_layer, torch.bfloat16)
        own.bias.data = layer.base_layer.bias.data.bfloat16()
    before, source, receiver = clone(sampler), ColumnSource(trainer), ColumnReceiver(sampler)
    receiver.expect(source.positions())
    receiver.check_base(source.base_columns())
    bring(source, receiver, everything=True)
    x = torch.randn(70, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(trainer(x), sampler(x))
    change(trainer, by=0.5)
    assert receiver.apply(source.columns())
    assert torch.equal(trainer(x), sampler(x))
    receiver.revert()
    assert_bits(sampler, before)


def test_4_bits_that_name_no_dtype_need_the_samplers():
    trainer = in_few_bits("bitsandbytes-nf4")
    for layer in net.layers_of(trainer):
        layer.base_layer.compute_dtype = None
    with pytest.raises(ValueError, match=r"'0.weight' is in 4 bits and does not say in what"):
        ColumnSource(trainer)
    assert ColumnSource(trainer, torch.bfloat16).columns().num_bytes


def test_merged_columns_are_not_sent(model, source, sync):
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"\['default'\] are merged .* `model.unmerge_adapter"):
        source.columns()
    model.unmerge_adapter()
    sync()


def test_columns_that_are_not_finite_are_not_sent(model):
    source, receiver = ColumnSource(model, torch.float16), ColumnReceiver(served(torch.float16))
    bring(source, receiver)
    change(model, by=1e5)
    message = r"1 of 14 tensors, .*q_proj.* not finite in torch.float16"
    with pytest.raises(ValueError, match=message):
        source.columns(everything=True)
    change(model, by=-1e5)
    assert receiver.apply(source.columns())


Q = "model.layers.0.self_attn.q_proj"
GATE, UP, DOWN = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({DOWN: t[DOWN].half()}),
            r"float16, but .*float32\. .* `ColumnSource",
        ),
        (lambda t: t.update({DOWN: t[DOWN][:30]}), "neither that nor the part of rank 0 of 1"),
        (lambda t: t.pop(DOWN), r"no tensor .*1.mlp.down_proj.* the nearest is"),
        (lambda t: t.update({UP: t[GATE]}), r"gate_proj.* and .*up_proj.* are one tensor"),
        (lambda t: t.update({f"{Q}.base_layer.weight": t.pop(f"{Q}.weight")}), "q_proj' has an"),
    ],
)
def test_receivers_refuse_other_models(source, server, change, message):
    tensors = dict(server.state_dict())
    change(tensors)
    with pytest.raises(ValueError, match=message):
        ColumnReceiver(tensors).expect(source.positions())


def test_receivers_of_a_part(source, server):
    part = {name: tensor for name, tensor in server.state_dict().items() if name != DOWN}
    ColumnReceiver(part, is_partial=True).expect(source.positions())
    with pytest.raises(ValueError, match="none of the trainer's tensors"):
        ColumnReceiver({}, is_partial=True).expect(source.positions())
    with pytest.raises(ValueError, match=r"`tp_rank` \(2\) must be in \[0, tp_size=2\)"):
        ColumnReceiver(part, tp_rank=2, tp_size=2)
    with pytest.raises(ValueError, match="no positions are known"):
        ColumnReceiver(part).apply(source.columns())


def test_names_without_the_prefix_and_other_names(model, source):
    step(model)
    expected = merged(model)
    bare = served().model
    bring(source, ColumnReceiver(bare))
    found = {f"model.{name}": tensor for name, tensor in bare.state_dict().items()}
    assert_bits(found, {name: expected[name] for name in expected if name != "lm_head.weight"})
    tensors = {f"engine.{name}": tensor for name, tensor in served().state_dict().items()}
    receiver = ColumnReceiver(tensors, rename=lambda name: f"engine.{name}")
    bring(source, receiver, everything=True)
    assert_bits(tensors, {f"engine.{name}": tensor for name, tensor in expected.items()})


def test_a_server_in_inference_mode(model, source):
    with torch.inference_mode():
        server = served()
    step(model)
    bring(source, ColumnReceiver(server))
    assert_bits(server, merged(model))


def test_weights_that_are_empty_here_are_refused(model, source):
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    for use in (source.columns, lambda: ColumnSource(model)):
        with pytest.raises(ValueError, match=r"is empty here.*deepspeed.zero.GatheredParameters"):
            use()
