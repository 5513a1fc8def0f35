"""R7: what is served is what a merge writes, to the last bit; all in one process."""

import itertools
import subprocess
import sys

import pytest
import torch

from pacatune import PacaConfig
from pacatune.ops.columns import Update
from pacatune.patch.memory import Place
from pacatune.sync import ColumnReceiver, ColumnSource
from pacatune.sync.message import Reader, to_wire
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
    optimizer = torch.optim.AdamW(net.trained(model), lr=1e-2)
    num_bytes = 4 * sum(one.out_features for one in net.layers_of(model)) * server.dtype.itemsize
    for number in range(1, 4):
        step(model, optimizer, number)
        columns = source.columns()
        assert columns.number == number
        assert columns.num_bytes == num_bytes
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


def test_another_scale_is_sent(model, source, receiver, sync):
    step(model)
    receiver.apply(source.columns())
    net.layers_of(model)[3].scaling["default"] *= 0.5
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
        receiver.check_base(source.base_columns())  # which is no sync that it would have missed
        assert receiver.apply(source.columns())
    sync()
    receiver.apply(source.base_columns())
    assert_bits(server, before)
    sync()


def test_a_missed_sync_is_refused_on_a_wire_and_mended(model, server, source, receiver):
    reader = Reader()
    receiver.apply(reader.read(*to_wire(source.columns())))
    nudge(model, 0)
    source.columns()
    nudge(model, 1)
    columns, before = source.columns(), clone(server)
    words, buffer = to_wire(columns)
    for other in (reader, Reader()):
        with pytest.raises(ValueError, match=r"sync 3 follows sync 2, which is not the last one h"):
            other.read(words, buffer)
    assert_bits(server, before)
    source.forget()
    assert receiver.apply(reader.read(*to_wire(source.columns())))
    assert_bits(server, merged(model))
    assert not receiver.apply(columns)  # it is older


def test_another_adapter_and_other_columns(model, server, source, receiver):
    before = clone(server)
    step(model)
    receiver.apply(source.columns())
    model.add_adapter("other", PacaConfig(r=3, random_seed=7, target_modules=["q_proj", "up_proj"]))
    model.set_adapter("other")
    step(model)
    columns = source.columns()
    assert len(columns.positions.sets) == 4
    assert columns.last is None
    receiver.apply(columns)
    assert_bits(server, merged(model))
    layer = net.layers_of(model)[0]
    columns = torch.tensor([0, 5, 9])
    layer.replace_update("other", Update(torch.ones(layer.out_features, 3), columns, 2.0), 3)
    bring(source, receiver)
    assert_bits(server, merged(model))
    with torch.no_grad():  # as load_state_dict does
        layer.paca_indices["other"].copy_(torch.tensor([1, 5, 9]))
    bring(source, receiver)
    expected = layer.get_base_layer().weight[:, [1, 5, 9]] + 2
    assert torch.equal(server.model.layers[0].self_attn.q_proj.weight[:, [1, 5, 9]], expected)
    model.set_adapter("default")
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
SET = {"parameter": "a", "dim": 1, "indices": [3, 7], "dtype": "float32"}
SET |= {"shape": [2, 9]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sets": {"a": SET}}, r"must be 16 bytes, got .* is damaged"),
        ({"sets": None}, "no message of a ColumnSource .AttributeError"),
        ({"sets": {"a": {}}}, "no message of a ColumnSource .KeyError"),
        ({"sets": {"a": {**SET, "shape": [INFINITE]}}}, "Source .Overflow"),
        ({"sets": {"a": {**SET, "shape": [-2, 9]}}}, "Source .RuntimeError: .* negative dimension"),
        ({"sets": {}}, "`sets` is empty"),
        ({"shapes": {"a": [-1]}}, "`shapes` has a negative size"),
        ({"sets": {"a": {**SET, "indices": [7, 3]}}}, "`indices` holds .* must be sorted"),
        ({"sets": {"a": {**SET, "indices": [3, 9]}}}, "`indices` holds columns up to 9|holds .*9"),
    ],
)
def test_messages_of_strangers(source, changes, message):
    words, buffer = to_wire(source.columns())
    with pytest.raises(ValueError, match=message):
        Reader().read(words | {"positions": words["positions"] | changes}, buffer)
    with pytest.raises(ValueError, match=r"must be \d+ bytes, got .* of torch.int32"):
        Reader().read(words, buffer.view(torch.int32))


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
    receiver.check_base(source.base_columns())
    bring(source, receiver)
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
        source.columns()
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
        ColumnReceiver(tensors).apply(source.columns())


def test_receivers_of_a_part(source, server):
    part = {name: tensor for name, tensor in server.state_dict().items() if name != DOWN}
    assert ColumnReceiver(part, is_partial=True).apply(source.columns())
    with pytest.raises(ValueError, match="none of the trainer's tensors"):
        ColumnReceiver({}, is_partial=True).apply(source.columns())
    with pytest.raises(ValueError, match=r"`tp_rank` \(2\) must be in \[0, tp_size=2\)"):
        ColumnReceiver(part, tp_rank=2, tp_size=2)


def test_names_without_the_prefix_and_other_names(model, source):
    step(model)
    expected = merged(model)
    bare = served().model
    bring(source, ColumnReceiver(bare))
    found = {f"model.{name}": tensor for name, tensor in bare.state_dict().items()}
    assert_bits(found, {name: expected[name] for name in expected if name != "lm_head.weight"})
    tensors = {f"engine.{name}": tensor for name, tensor in served().state_dict().items()}
    receiver = ColumnReceiver(tensors, rename=lambda name: f"engine.{name}")
    bring(source, receiver)
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
