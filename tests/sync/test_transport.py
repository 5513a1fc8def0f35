"""Transports: in order, late, interrupted, over processes; nothing is lost."""

import json
import os
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from pacatune.sync import ColumnReceiver, ColumnSource, File, InProcess
from tests.adapters import kinds
from tests.distributed import net
from tests.full_disk import limited_files
from tests.releases import needs
from tests.sync.conftest import adapt, assert_bits, bring, change, clone, merged, step

# torch 2.6 has no FSDP2 on CPUs.
on_cpu = needs("torch", "2.7")


def test_in_process(model, server, source, receiver):
    transport = InProcess(capacity=1, timeout=0.05)
    source.send(transport)
    assert receiver.receive(transport).number == 1
    change(model)
    source.send(transport)
    assert receiver.receive(transport).number == 2
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


def test_a_receiver_that_is_gone_loses_nothing(model, server, source):
    transport, other = InProcess(capacity=1, timeout=0.02), InProcess(timeout=30)
    source.send(transport)
    change(model)
    with pytest.raises(TimeoutError, match=r"1 syncs wait, .* is it still there"):
        source.send(transport)
    source.send(other)  # of another server
    assert ColumnReceiver(server).receive(other).last is None
    assert_bits(server, merged(model))


# Files.


@pytest.fixture
def reader(tmp_path):
    return File(tmp_path, timeout=0.05)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_files_in_order(model, server, source, receiver, tmp_path):
    folder = tmp_path / "new" / "sync"
    sender, reader = File(folder), File(folder, timeout=0.05)
    with pytest.raises(TimeoutError, match=r"nothing new was written .* for 0.05 s"):
        receiver.receive(reader)
    for number in range(1, 4):
        change(model)
        source.send(sender)
        assert receiver.receive(reader).number == number
        assert_bits(server, merged(model))
    assert not list(folder.glob(".*"))
    sender.close()
    with pytest.raises(EOFError, match="no more columns will come"):
        receiver.receive(reader)


def test_a_late_reader_begins_with_the_last_complete_sync(model, server, source, reader, tmp_path):
    sender = File(tmp_path)
    for number in range(3):
        source.forget()
        step(model, seed=number)
        source.send(sender)
    change(model)
    source.send(sender)
    assert names_in(tmp_path) == [f"00000{n}.safetensors" for n in (2, 3, 4)]
    receiver = ColumnReceiver(server)
    assert [receiver.receive(reader).number for _ in range(2)] == [3, 4]
    assert_bits(server, merged(model))


def test_a_restarted_trainer_goes_on_in_its_folder(model, server, receiver, reader, tmp_path):
    ColumnSource(model).send(File(tmp_path))
    receiver.receive(reader)
    change(model)
    first, source = File(tmp_path), ColumnSource(model)
    source.send(first)
    assert receiver.receive(reader).number == 1
    assert_bits(server, merged(model))
    File(tmp_path).send(source.columns())
    with pytest.raises(FileExistsError, match="another trainer writes to"):
        source.send(first)


def test_a_trainer_that_was_faster_keeps_its_message(source, tmp_path, monkeypatch):
    """Both have looked at the folder before either has written."""
    source.send(File(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    second = File(tmp_path)
    monkeypatch.setattr(second, "_numbers", list)
    with pytest.raises(FileExistsError, match="another trainer writes to"):
        second.send(source.columns())
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


WORDS = {"pacatune_sync": json.dumps({"kind": "columns"})}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: save_file({"buffer": torch.zeros(3)}, path), "use a folder for syncs alone"),
        (lambda path: save_file({"other": torch.zeros(3)}, path, WORDS), "it has no buffer"),
        (lambda path: path.write_bytes(b"12345678"), "truncated or no safetensors file"),
        (lambda path: path.symlink_to(__file__), "is a link to .*, outside of the folder"),
        (os.mkfifo, "is not a regular file"),
    ],
)
def test_other_files_are_refused(reader, tmp_path, write, message):
    write(tmp_path / "000001.safetensors")
    with pytest.raises(ValueError, match=message):
        reader.receive()


def test_a_disk_that_runs_full_keeps_what_was_sent(
    model, server, source, receiver, reader, tmp_path
):
    sender = File(tmp_path)
    source.send(sender)
    before = names_in(tmp_path)
    step(model)
    full = pytest.raises(ValueError, match=r"could not write '.*000002.safetensors' .*nothing was")
    with limited_files(), full:
        source.send(sender)
    assert names_in(tmp_path) == before
    last = source.send(sender).number
    while receiver.receive(reader).number < last:
        pass
    assert_bits(server, merged(model))


# R6: trainers of which each process has a part.


def train_shards(how):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from tests.distributed.test_fsdp2 import shard

    torch.manual_seed(0)
    sizes = tuple(net.UNEVEN.items()) if how == "uneven" else ()
    dtype = torch.bfloat16 if how == "bfloat16" else None
    options = {}
    if how == "mixed precision":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    one = net.adapt("float32", sizes)
    model = shard(net.adapt("float32", sizes), how != "gathered", **options)
    server = net.build_base("float32", sizes).to(dtype or torch.float32)
    base, source, receiver = clone(server), ColumnSource(model, dtype), ColumnReceiver(server)
    optimizer = torch.optim.AdamW(net.trained(model), lr=1e-2)
    for number in range(2):
        net.step(model, optimizer, net.half(net.batches()[number]))
        with torch.no_grad():
            model(input_ids=net.batches()[2])  # leaves what it gathered, perhaps
        bring(source, receiver)
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
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    options = {"r": 5, "init_weights": False, **kinds.OPTIONS["conv1d"]}
    one, other = (adapt(base=kinds.build("conv1d"), **options) for _ in range(2))
    with torch.no_grad():  # its sign has to survive
        for layer in net.layers_of(one):
            layer.get_base_layer().weight.fill_(-0.0)
            layer.delta_of("default").zero_()
    state, sharded, server = one.state_dict(), fully_shard(other), kinds.build("conv1d")
    set_model_state_dict(sharded, state, options=StateDictOptions(full_state_dict=True))
    source = ColumnSource(sharded)
    bring(source, ColumnReceiver(server))
    expected = merged(one)
    for columns in source.positions().sets:
        found, needed = (
            tensors[columns.name].index_select(columns.dim, columns.indices).view(torch.int32)
            for tensors in (server.state_dict(), expected)
        )
        assert torch.equal(found, needed)
    return True


@on_cpu
@pytest.mark.slow
def test_fsdp2_whose_shards_cut_the_columns(pair):
    assert pair.run(shard_conv1d) == [True, True]
