"""Source and receiver in one process: what is served is what a merge writes, to the last bit."""

import itertools
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from pacatune.patch.memory import Place
from pacatune.sync import ColumnReceiver, ColumnSource
from pacatune.sync.message import from_wire, to_wire
from tests.distributed import net
from tests.distributed.partition import gather, partition, release
from tests.releases import needs
from tests.sync.conftest import adapt, assert_bits, clone, merged, served, step

DTYPES = [torch.float32, torch.bfloat16]


def connect(model, server, **options):
    source, receiver = ColumnSource(model, **options), ColumnReceiver(server)
    receiver.expect(source.positions())
    return source, receiver


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(
    ("trained", "dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, None)],
)
def test_server_has_the_bits_of_a_merge_after_every_step(trained, dtype, groups):
    model = adapt(trained, groups=groups)
    server = served(dtype or trained)
    before, kept = clone(server), dict(server.named_parameters())
    source, receiver = connect(model, server, dtype=dtype)
    optimizer = torch.optim.AdamW(net.trained(model), lr=1e-2)
    for number in range(1, 4):
        step(model, optimizer, number)
        columns = source.columns()
        assert (columns.number, columns.since) == (number, 0)
        assert columns.num_bytes == source.positions().num_bytes
        assert receiver.apply(columns)
        assert_bits(server, merged(model, dtype))
        assert not receiver.apply(columns)  # once is enough
    assert receiver.number == 3
    receiver.revert()
    assert_bits(server, before)
    assert all(parameter is kept[name] for name, parameter in server.named_parameters())


def test_bytes_are_the_columns_share(model):
    source = ColumnSource(model, torch.bfloat16)
    layers = net.layers_of(model)
    expected = sum(2 * layer.out_features * 4 for layer in layers)
    assert source.positions().num_bytes == source.columns().num_bytes == expected


def test_the_source_neither_writes_nor_looks(model):
    optimizer = torch.optim.AdamW(net.trained(model), lr=1e-2)
    source = ColumnSource(model)
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


def test_the_source_reads_the_columns_of_stale_weights(model):
    """After a step the weights hold the columns before it."""
    step(model)
    net.loss_of(model, net.batches()[0]).backward()
    assert all(layer.residency.is_written for layer in net.layers_of(model))
    for parameter in net.trained(model):
        parameter.data.add_(0.01)
    server = served()
    source, receiver = connect(model, server)
    receiver.apply(source.columns())
    assert_bits(server, merged(model))


def test_only_what_was_changed_is_sent(model):
    server = served()
    source, receiver = connect(model, server)
    step(model)
    receiver.apply(source.columns())
    nothing = source.columns()
    assert (nothing.num_bytes, nothing.since) == (0, 1)
    assert receiver.apply(nothing)
    layer = net.layers_of(model)[3]
    with torch.no_grad():
        layer.delta_of("default").add_(1)
    some = source.columns()
    assert list(some.by_name(source.positions())) == [source.positions().sets[3].name]
    assert receiver.apply(some)
    assert_bits(server, merged(model))
    layer.scaling["default"] *= 0.5
    receiver.apply(source.columns())
    assert_bits(server, merged(model))


def test_fused_optimizers_and_data_edits_are_noticed(model):
    server = served()
    source, receiver = connect(model, server)
    receiver.apply(source.columns())
    step(model, torch.optim.AdamW(net.trained(model), lr=1e-2, fused=True))
    receiver.apply(source.columns())
    assert_bits(server, merged(model))
    held = net.layers_of(model)[0].delta_of("default").data
    held += 1
    receiver.apply(source.columns())
    held += 1
    receiver.apply(source.columns())
    assert_bits(server, merged(model))


def test_a_changed_base_is_sent(model):
    server = served()
    source, receiver = connect(model, server)
    receiver.apply(source.columns())
    state = {
        name: tensor * 2 for name, tensor in model.state_dict().items() if "base_layer" in name
    }
    model.load_state_dict(state, strict=False)
    receiver.apply(source.columns())
    expected = merged(model)
    for one in source.positions().sets:
        columns = server.get_parameter(one.name).index_select(one.dim, one.indices)
        assert torch.equal(columns, expected[one.name].index_select(one.dim, one.indices)), one.name


def test_switched_off_adapters_send_the_base(model):
    server = served()
    before = clone(server)
    source, receiver = connect(model, server)
    step(model)
    receiver.apply(source.columns())
    with model.disable_adapter():
        receiver.apply(source.columns())
        assert_bits(server, before)
        assert source.columns().num_bytes == 0
    receiver.apply(source.columns())
    assert_bits(server, merged(model))
    receiver.apply(source.base_columns())
    assert_bits(server, before)
    receiver.apply(source.columns())
    assert_bits(server, merged(model))


def test_a_missed_sync_is_refused_and_mended(model):
    server = served()
    source, receiver = connect(model, server)
    receiver.apply(source.columns())
    layer = net.layers_of(model)[0]
    for _ in range(2):
        with torch.no_grad():
            layer.delta_of("default").add_(1)
        missed, last = source.columns(), source.columns()
    before = clone(server)
    with pytest.raises(ValueError, match=r"since sync 4, and the weights hold sync 1; ask for"):
        receiver.apply(last)
    assert missed.since == 3
    assert_bits(server, before)
    assert receiver.apply(source.columns(everything=True))
    assert_bits(server, merged(model))


def test_another_adapter_and_other_columns(model):
    from pacatune import PacaConfig

    server = served()
    before = clone(server)
    source, receiver = connect(model, server)
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
    receiver.expect(source.positions())
    assert receiver.number == 1  # still served
    receiver.apply(source.columns(everything=True))
    assert_bits(server, merged(model))
    layer = net.layers_of(model)[0]
    layer.replace_update("other", torch.ones(layer.out_features, 3), torch.tensor([0, 5, 9]), 6.0)
    receiver.expect(source.positions())
    receiver.apply(source.columns())
    assert_bits(server, merged(model))
    with torch.no_grad():  # as load_state_dict does
        layer.paca_indices["other"].copy_(torch.tensor([1, 5, 9]))
    receiver.expect(source.positions())
    receiver.apply(source.columns())
    expected = layer.get_base_layer().weight[:, [1, 5, 9]] + 2
    assert torch.equal(server.model.layers[0].self_attn.q_proj.weight[:, [1, 5, 9]], expected)
    model.set_adapter("default")
    assert source.positions().version == first
    receiver.expect(source.positions())
    receiver.apply(source.columns())
    assert_bits(server, merged(model))
    receiver.revert()
    assert_bits(server, before)


def test_an_adapter_by_its_name(model):
    from pacatune import PacaConfig

    model.add_adapter("other", PacaConfig(r=3, target_modules=["q_proj"], init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"2 adapters are active \(default, other\)"):
        ColumnSource(model)
    server = served()
    source, receiver = connect(model, server, adapter="other")
    receiver.apply(source.columns())
    model.set_adapter("other")
    assert_bits(server, merged(model))
    with pytest.raises(ValueError, match="no layer has an adapter 'missing' of PaCA"):
        ColumnSource(model, adapter="missing")


def test_the_base_is_compared(model):
    server = served()
    source, receiver = connect(model, server)
    receiver.check_base(source.base_columns())
    receiver.apply(source.columns())
    receiver.check_base(source.base_columns())
    other = served()
    one = source.positions().sets[2]
    with torch.no_grad():
        other.get_parameter(one.name)[1, one.indices[1]] += 1
    receiver = ColumnReceiver(other)
    receiver.expect(source.positions())
    with pytest.raises(ValueError, match=rf"1 of 14 tensors, first '{one.name}', are not"):
        receiver.check_base(source.base_columns())


def test_an_interrupted_sync_is_taken_back(model, monkeypatch):
    server = served()
    source, receiver = connect(model, server)
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

    monkeypatch.setattr(Place, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        receiver.apply(columns)
    monkeypatch.undo()
    assert_bits(server, before)
    assert receiver.number == 1
    assert receiver.apply(columns)
    assert_bits(server, merged(model))


@pytest.mark.parametrize("groups", [1, 4])
def test_messages_over_the_wire(groups):
    model = adapt(groups=groups)
    source = ColumnSource(model)
    step(model)
    positions = from_wire(*to_wire(source.positions()))
    columns = source.columns()
    sent = from_wire(*to_wire(columns))
    assert positions.version == source.positions().version
    assert [one.name for one in positions.sets] == [one.name for one in source.positions().sets]
    for name, tensor in sent.by_name(positions).items():
        assert torch.equal(tensor, columns.by_name(source.positions())[name])
    words, buffer = to_wire(columns)
    with pytest.raises(ValueError, match=r"must be \d+ bytes, got .* the message is damaged"):
        from_wire(words, buffer[:-1]).by_name(positions)
    with pytest.raises(ValueError, match="beyond the 14 known"):
        from_wire({**words, "ordinals": [14]}, buffer).by_name(positions)
    with pytest.raises(ValueError, match=r"no message of a ColumnSource \(KeyError"):
        from_wire({"kind": "columns"}, buffer)
    for ordinals in ([0, 0], [0]):  # the second has all columns, it says
        part = from_wire({**words, "ordinals": ordinals, "since": 0}, buffer)
        with pytest.raises(ValueError, match=r"or one twice|are of 1 tensors, not of all 14"):
            part.by_name(positions)
    words, buffer = to_wire(positions)
    with pytest.raises(ValueError, match="`indices` must increase"):
        from_wire(words, buffer.view(torch.int64).flip(0).view(torch.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sets": []}, "`sets` is empty"),
        ({"sets": [{}]}, "no message of a ColumnSource"),
        ({"sets": [{"shape": [float("inf"), 2]}]}, "no message of a ColumnSource .Overflow"),
        ({"kind": "columns", "version": "a", "number": float("inf")}, "ColumnSource .Overflow"),
        ({"shapes": {"a": [-1]}}, "`shapes` has a negative size"),
        ({"sets": None}, "no message of a ColumnSource .TypeError"),
    ],
)
def test_messages_of_strangers(model, changes, message):
    words, buffer = to_wire(ColumnSource(model).positions())
    if changes.get("sets"):
        changes = {"sets": [words["sets"][0] | one if one else one for one in changes["sets"]]}
    server = served()
    before, receiver = clone(server), ColumnReceiver(server)
    own = buffer[:0] if changes.get("sets") == [] else buffer
    with pytest.raises(ValueError, match=message):
        receiver.expect(from_wire(words | changes, own))
    for wrong in (buffer.view(torch.int64), buffer[:-8], torch.cat((buffer, buffer))):
        with pytest.raises(ValueError, match=r"message|`indices`"):
            from_wire(words, wrong)
    assert_bits(server, before)


def test_a_server_needs_no_peft():
    code = """
        import sys
        from pacatune.sync import ColumnReceiver, Distributed, File, InProcess, SharedWeights
        assert not {"peft", "transformers", "accelerate"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_an_unadapted_or_otherwise_trained_model_is_refused(model):
    with pytest.raises(ValueError, match="has no PaCA layers; adapt it first"):
        ColumnSource(served())
    with pytest.raises(ValueError, match=r"also trains .*lm_head.*, which is no column"):
        ColumnSource(adapt(modules_to_save=["lm_head"]))
    source = ColumnSource(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"\['default'\] are merged .* `model.unmerge_adapter"):
        source.columns()
    model.unmerge_adapter()
    assert source.columns().num_bytes


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_tied_weights_are_refused():
    from peft import get_peft_model

    from pacatune import PacaConfig
    from tests.conftest import build_model

    base = build_model(64, tie_word_embeddings=True)
    model = get_peft_model(base, PacaConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"'lm_head.weight' is tied to another module"):
        ColumnSource(model)


def test_columns_that_are_not_finite_are_not_sent(model):
    source = ColumnSource(model, torch.float16)
    receiver = ColumnReceiver(served(torch.float16))
    receiver.expect(source.positions())
    receiver.apply(source.columns())
    layer = net.layers_of(model)[0]
    with torch.no_grad():
        layer.delta_of("default").fill_(1e5)
    with pytest.raises(
        ValueError, match=r"1 of 14 tensors, .*q_proj.* not finite in torch.float16"
    ):
        source.columns(everything=True)
    with torch.no_grad():
        layer.delta_of("default").fill_(1)
    assert receiver.apply(source.columns())


def test_receivers_refuse_other_models(model):
    positions = ColumnSource(model).positions()
    with pytest.raises(ValueError, match="no positions are known"):
        ColumnReceiver(served()).apply(ColumnSource(model).columns())
    with pytest.raises(
        ValueError,
        match=r"bfloat16, but the columns are .* in torch.float32\. .* `ColumnSource\(model, dtype",
    ):
        ColumnReceiver(served(torch.bfloat16)).expect(positions)
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj' has an adapter"):
        ColumnReceiver(adapt()).expect(positions)
    state = served().state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    quantized = {**state, name: state[name].to(torch.float8_e4m3fn)}
    with pytest.raises(
        ValueError,
        match=r"in torch.float8_e4m3fn, .* Serve the base that is trained, not quantised",
    ):
        ColumnReceiver(quantized).expect(positions)
    with pytest.raises(ValueError, match=r"which is neither that nor the part of rank 0 of 1"):
        ColumnReceiver({**state, name: state[name][:30]}).expect(positions)
    del state[name]
    with pytest.raises(ValueError, match=r"no tensor .*1.mlp.down_proj.* the nearest is"):
        ColumnReceiver(state).expect(positions)
    ColumnReceiver(state, is_partial=True).expect(positions)
    with pytest.raises(ValueError, match="none of the trainer's tensors"):
        ColumnReceiver({}, is_partial=True).expect(positions)
    tied = {**served().state_dict()}
    tied["model.layers.0.mlp.up_proj.weight"] = tied["model.layers.0.mlp.gate_proj.weight"]
    with pytest.raises(ValueError, match=r"gate_proj.* and .*up_proj.* are one tensor"):
        ColumnReceiver(tied).expect(positions)
    with pytest.raises(ValueError, match=r"`tp_rank` \(2\) must be in \[0, tp_size=2\)"):
        ColumnReceiver(served(), tp_rank=2, tp_size=2)


def test_names_without_the_prefix_and_other_names(model):
    source = ColumnSource(model)
    step(model)
    expected = merged(model)
    bare = served().model
    receiver = ColumnReceiver(bare)
    receiver.expect(source.positions())
    receiver.apply(source.columns())
    assert_bits(
        {f"model.{k}": v for k, v in bare.state_dict().items()},
        {name: tensor for name, tensor in expected.items() if name != "lm_head.weight"},
    )
    tensors = {f"engine.{name}": tensor for name, tensor in served().state_dict().items()}
    receiver = ColumnReceiver(tensors, rename=lambda name: f"engine.{name}")
    receiver.expect(source.positions())
    receiver.apply(source.columns(everything=True))
    assert_bits(tensors, {f"engine.{name}": tensor for name, tensor in expected.items()})


def test_a_server_in_inference_mode(model):
    source = ColumnSource(model)
    with torch.inference_mode():
        server = served()
    receiver = ColumnReceiver(server)
    receiver.expect(source.positions())
    step(model)
    receiver.apply(source.columns())
    assert_bits(server, merged(model))


def other_kinds(kind, groups=1):
    """An adapted model of another kind of layer, and its plain base."""
    from peft import get_peft_model

    from pacatune import PacaConfig

    def build():
        torch.manual_seed(0)
        if kind == "conv1d":
            from transformers import GPT2Config, GPT2LMHeadModel

            return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
        if kind == "convolutions":
            return nn.Sequential(
                nn.Conv2d(6, 4, 3), nn.Conv2d(4, 8, 1, groups=2), nn.Conv1d(8, 4, 1)
            )
        if kind == "attention":
            return nn.Sequential(nn.MultiheadAttention(8, 2))
        if kind == "embedding":
            return nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 4))
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_experts=4,
                num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                vocab_size=32, num_experts_per_tok=2,
            )
        )  # fmt: skip

    options = {
        "conv1d": {"target_modules": ["c_attn", "c_fc"]},
        "convolutions": {"target_modules": ["0", "1", "2"]},
        "attention": {"target_modules": ["0", "0.out_proj"]},
        "embedding": {"target_modules": ["0", "1"]},
        "experts": {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
    }[kind]
    if groups > 1 and kind == "convolutions":  # one has groups of its own
        options["target_modules"] = ["0", "2"]
    config = PacaConfig(r=3, groups=groups, init_weights=False, **options)
    return get_peft_model(build(), config), build()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "kind",
    [
        *("conv1d", "convolutions", "attention", "embedding"),
        pytest.param("experts", marks=needs("transformers", "5")),
    ],
)
def test_every_kind_of_layer(kind, groups):
    model, server = other_kinds(kind, groups)
    before = clone(server)
    source, receiver = connect(model, server)
    receiver.apply(source.columns())
    expected = merged(model)
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in before.items())
    assert_bits(server, expected)
    source.columns()  # the merge has copied the deltas, and might have changed them
    assert source.columns().num_bytes == 0
    receiver.revert()
    assert_bits(server, before)


def test_partitioned_weights_are_gathered_by_the_caller():
    """ZeRO-3, imitated: outside of a gathering context nothing is there."""
    model = adapt()
    server = served()
    source, receiver = connect(model, server)
    expected = merged(step(model))
    partition(model)
    with pytest.raises(ValueError, match=r"is empty here.*deepspeed.zero.GatheredParameters"):
        source.columns()
    gather(model.parameters())
    receiver.apply(source.columns())
    assert_bits(server, expected)
    release(model.parameters())
    with pytest.raises(ValueError, match="is empty here"):
        ColumnSource(model)
