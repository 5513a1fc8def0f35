"""Transports: in order, late, interrupted, over processes; nothing is lost."""

import json
import os
import threading
import time
from datetime import timedelta

import pytest
import torch

from pacatune.sync import ColumnReceiver, ColumnSource, Distributed, File, InProcess
from tests.distributed import net
from tests.distributed.pair import Pair
from tests.full_disk import limited_files
from tests.releases import has, needs
from tests.sync.conftest import adapt, assert_bits, merged, served, step

# torch 2.6 has no FSDP2 on CPUs.
on_cpu = needs("torch", "2.7")


def change(model, number=0):
    with torch.no_grad():
        net.layers_of(model)[number].delta_of("default").add_(1)


def test_in_process(model):
    server, transport = served(), InProcess(capacity=2, timeout=0.05)
    source, receiver = ColumnSource(model), ColumnReceiver(server)
    source.send(transport)
    assert receiver.receive(transport).number == 1
    change(model)
    source.send(transport)
    assert receiver.receive(transport).since == 1
    assert_bits(server, merged(model))
    with pytest.raises(TimeoutError, match=r"nothing was sent for 0.05 s"):
        receiver.receive(transport)
    thread = threading.Thread(target=lambda: (time.sleep(0.1), source.send(transport)))
    thread.start()
    assert receiver.receive(transport, timeout=30).number == 3
    thread.join()
    transport.close()
    for _ in range(2):
        with pytest.raises(EOFError, match="no more columns will come"):
            receiver.receive(transport)


def test_a_receiver_that_is_gone_loses_nothing(model):
    transport = InProcess(capacity=2, timeout=0.02)
    source = ColumnSource(model)
    source.send(transport)
    change(model)
    with pytest.raises(TimeoutError, match=r"2 messages wait, .* is it still there"):
        source.send(transport)
    server, other = served(), InProcess(timeout=30)  # of another server
    receiver = ColumnReceiver(server)
    source.send(other)
    assert receiver.receive(other).since == 0
    assert_bits(server, merged(model))


def test_files_in_order(model, tmp_path):
    server = served()
    source, receiver = ColumnSource(model), ColumnReceiver(server)
    sender, reader = File(tmp_path / "new" / "sync"), File(tmp_path / "new" / "sync", timeout=0.05)
    with pytest.raises(TimeoutError, match=r"nothing new was written .* for 0.05 s"):
        receiver.receive(reader)
    for number in range(1, 4):
        change(model)
        source.send(sender)
        assert receiver.receive(reader).number == number
        assert_bits(server, merged(model))
    assert not [path.name for path in (tmp_path / "new" / "sync").glob(".*")]
    sender.close()
    with pytest.raises(EOFError, match="no more columns will come"):
        receiver.receive(reader)


def test_a_late_reader_begins_with_the_last_complete_sync(model, tmp_path):
    source, sender = ColumnSource(model), File(tmp_path, keep=1)
    for number in range(3):
        source.forget()
        step(model, seed=number)
        source.send(sender)
    change(model)
    source.send(sender)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"00000{n}.safetensors" for n in (1, 3, 5, 6, 7)]
    server = served()
    receiver, reader = ColumnReceiver(server), File(tmp_path, timeout=0.05)
    assert [receiver.receive(reader).number for _ in range(2)] == [3, 4]
    assert_bits(server, merged(model))


def test_a_restarted_trainer_goes_on_in_its_folder(model, tmp_path):
    server = served()
    receiver, reader = ColumnReceiver(server), File(tmp_path, timeout=0.05)
    ColumnSource(model).send(File(tmp_path))
    receiver.receive(reader)
    first = File(tmp_path)
    change(model)
    source = ColumnSource(model)
    source.send(first)
    assert receiver.receive(reader).number == 1
    assert_bits(server, merged(model))
    File(tmp_path).send(source.columns())
    with pytest.raises(FileExistsError, match="another trainer writes to"):
        source.send(first)


def test_a_trainer_that_was_faster_keeps_its_message(model, tmp_path, monkeypatch):
    """Both have looked at the folder before either has written."""
    source = ColumnSource(model)
    source.send(File(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    second = File(tmp_path)
    monkeypatch.setattr(second, "_numbers", list)
    with pytest.raises(FileExistsError, match="another trainer writes to"):
        second.send(source.columns())
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"buffer": torch.zeros(3)}, tmp_path / "000001.safetensors")
    with pytest.raises(ValueError, match="is no message of a trainer"):
        File(tmp_path, timeout=0.1).receive()
    words = json.dumps({"kind": "positions"})
    path = tmp_path / "000001.safetensors"
    save_file({"other": torch.zeros(3)}, path, metadata={"pacatune_sync": words})
    with pytest.raises(ValueError, match="is no message of a trainer"):
        File(tmp_path, timeout=0.1).receive()
    (tmp_path / "000001.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        File(tmp_path, timeout=0.1).receive()
    path.rename(tmp_path.parent / "elsewhere")
    path.symlink_to(tmp_path.parent / "elsewhere")
    with pytest.raises(ValueError, match=r"is a link to .*elsewhere, outside of the folder"):
        File(tmp_path, timeout=0.1).receive()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is not a regular file"):
        File(tmp_path, timeout=0.1).receive()
    with pytest.raises(ValueError, match=r"`keep` \(0\) must be at least 1"):
        File(tmp_path, keep=0)


def test_a_disk_that_runs_full_keeps_what_was_sent(model, tmp_path):
    source, sender = ColumnSource(model), File(tmp_path)
    source.send(sender)
    before = sorted(path.name for path in tmp_path.iterdir())
    step(model)
    full = pytest.raises(ValueError, match=r"could not write '.*000003.safetensors' .*nothing was")
    with limited_files(), full:
        source.send(sender)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    last = source.send(sender).number
    receiver, reader = ColumnReceiver(server := served()), File(tmp_path, timeout=0.05)
    while receiver.receive(reader).number < last:
        pass
    assert_bits(server, merged(model))


def train_and_serve():
    """Rank 0 trains, rank 1 serves; both return what the served model has to be, and is."""
    transport, is_trainer = Distributed(src=0), torch.distributed.get_rank() == 0
    expected = []
    if is_trainer:
        model = adapt()
        source = ColumnSource(model, torch.bfloat16)
        for seed in range(3):
            step(model, seed=seed) if seed < 2 else change(model, 5)
            source.send(transport)
            expected.append(merged(model, torch.bfloat16))
        source.send(transport)
        transport.close()
        return expected
    server = served(torch.bfloat16)
    receiver = ColumnReceiver(server)
    for _ in range(3):
        receiver.receive(transport)
        expected.append({name: tensor.clone() for name, tensor in server.state_dict().items()})
    assert receiver.receive(transport).number == 4
    for error in (EOFError, ConnectionError):
        try:
            receiver.receive(transport)
        except error:
            continue
        raise AssertionError(error)
    return expected


def test_distributed(pair):
    trained, used = pair.run(train_and_serve)
    for expected, found in zip(trained, used, strict=True):
        assert_bits(found, expected)


def wait_in_vain():
    group = torch.distributed.new_group(timeout=timedelta(seconds=2))
    transport = Distributed(group, src=0, timeout=0.5)
    if torch.distributed.get_rank() == 0:
        time.sleep(1.5)
        return None, None
    with pytest.raises((TimeoutError, ConnectionError), match=r"the sender is gone, or too slow"):
        transport.receive()
    with pytest.raises(ConnectionError, match=r"cannot be used any more.*new_group"):
        transport.receive()
    with pytest.raises(ConnectionError, match="cannot be used"):
        transport.send(None)
    return True, True


def test_a_trainer_that_does_not_send(tmp_path):
    pair = Pair(tmp_path / "rendezvous")
    try:
        assert pair.run(wait_in_vain)[1] == (True, True)
    finally:
        pair.close()


def test_distributed_needs_a_group_and_its_roles(pair):
    with pytest.raises(ValueError, match=r"call `torch.distributed.init_process_group` first"):
        Distributed()
    pair.run(take_the_wrong_part)


def take_the_wrong_part():
    transport = Distributed(src=0)
    if torch.distributed.get_rank() == 0:
        with pytest.raises(ValueError, match=r"rank 0 sends \(`src` is 0\)"):
            transport.receive()
    else:
        with pytest.raises(ValueError, match=r"rank 1 receives \(`src` is 0\)"):
            transport.send(None)


# Trainers of which each process has a part.


def train_shards(how):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from tests.distributed.test_fsdp2 import shard

    torch.manual_seed(0)
    sizes = tuple(net.UNEVEN.items()) if how == "uneven" else ()
    dtype = torch.bfloat16 if how == "bfloat16" else None
    one = net.adapt("float32", sizes)
    sharded = net.adapt("float32", sizes)
    options = {}
    if how == "mixed precision":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = shard(sharded, how != "gathered", **options)
    source = ColumnSource(model, dtype)
    server = net.build_base("float32", sizes).to(dtype or torch.float32)
    base = {name: tensor.clone() for name, tensor in server.state_dict().items()}
    receiver = ColumnReceiver(server)
    optimizer = torch.optim.AdamW(net.trained(model), lr=1e-2)
    for number in range(2):
        net.loss_of(model, net.half(net.batches()[number])).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model(input_ids=net.batches()[2])  # leaves what it gathered, perhaps
        receiver.expect(source.positions())
        receiver.apply(source.columns())
    deltas = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.trained(model)]
    with torch.no_grad():
        for parameter, delta in zip(net.trained(one), deltas, strict=True):
            parameter.copy_(delta)
    assert_bits(server, merged(one, dtype))
    receiver.check_base(source.base_columns())
    receiver.revert()
    assert_bits(server, base)
    return len(source.positions().sets)


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "uneven", "gathered", "bfloat16", "mixed precision"])
def test_fsdp2(pair, how):
    assert pair.run(train_shards, how) == [14, 14]


def shard_conv1d():
    from peft import get_peft_model
    from torch.distributed.fsdp import fully_shard
    from transformers import GPT2Config, GPT2LMHeadModel

    from pacatune import PacaConfig

    def build():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_embd=18, n_layer=1, n_head=2, vocab_size=32))

    config = PacaConfig(r=5, target_modules=["c_attn", "c_proj"], init_weights=False)
    torch.manual_seed(1)
    one = get_peft_model(build(), config)
    with torch.no_grad():  # its sign has to survive
        for layer in net.layers_of(one):
            layer.get_base_layer().weight.fill_(-0.0)
            layer.delta_of("default").zero_()
    sharded = fully_shard(get_peft_model(build(), config))
    state = one.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(sharded, state, options=StateDictOptions(full_state_dict=True))
    server = build()
    receiver, source = ColumnReceiver(server), ColumnSource(sharded)
    receiver.expect(source.positions())
    receiver.apply(source.columns())
    expected = merged(one)
    for one_set in source.positions().sets:
        parts = (
            tensor.index_select(one_set.dim, one_set.indices).view(torch.int32)
            for tensor in (server.get_parameter(one_set.name).detach(), expected[one_set.name])
        )
        assert torch.equal(*parts)
    return True


@on_cpu
@pytest.mark.slow
def test_fsdp2_whose_shards_cut_the_columns(pair):
    assert pair.run(shard_conv1d) == [True, True]


def split_by_plan(folder):
    from tests.distributed.tensor_parallel import adapt as adapt_parts
    from tests.distributed.tensor_parallel import load
    from tests.distributed.tensor_parallel import step as step_parts

    model = adapt_parts(load(folder, "float32"))
    source = ColumnSource(model)
    server = load(folder, "float32", parts=False)
    base = {name: tensor.clone() for name, tensor in server.state_dict().items()}
    receiver = ColumnReceiver(server)
    receiver.expect(source.positions())
    step_parts(model)
    receiver.apply(source.columns())
    one = adapt_parts(load(folder, "float32", parts=False))
    with torch.no_grad():
        for other, layer in zip(net.layers_of(one), net.layers_of(model), strict=True):
            other.delta_of("default").copy_(layer.whole_delta("default"))
    assert_bits(server, merged(one))
    receiver.apply(source.base_columns())
    assert_bits(server, base)
    return True


@pytest.mark.slow
@pytest.mark.skipif(not has("transformers", "5.17"), reason="needs transformers >= 5.17")
def test_tensor_parallel_trainer(pair, tmp_path):
    net.build_base("float32").save_pretrained(tmp_path)
    assert pair.run(split_by_plan, str(tmp_path)) == [True, True]
