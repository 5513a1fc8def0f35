"""Two processes over one copy of the weights: whole updates, no copy, nobody waits for the dead."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.multiprocessing  # its pickles pass memory, not values
from torch import nn

from pacatune.sync import SharedWeights
from tests.distributed import net
from tests.sync.conftest import adapt, clone, merged, served, step

IDS = torch.arange(3, 35).view(1, -1)


def sample(connection, model, path):
    torch.set_num_threads(1)
    shared = SharedWeights(path, timeout=20)
    while True:
        command, timeout = connection.recv()
        try:
            with shared.reading(timeout=timeout) as version, torch.no_grad():
                if command == "logits":
                    connection.send((version, model(input_ids=IDS).logits.numpy()))
                elif command == "hold":
                    connection.send((version, None))
                    connection.recv()
        except TimeoutError as error:
            connection.send(("TimeoutError", str(error)))
        if command == "hold":
            connection.send(("let go", None))
        if command == "watch":
            connection.send(watch(shared, model, timeout))


def watch(shared, model, count):
    """Look at all columns until so many versions were seen; return these, and if all were whole."""
    weights = [p for name, p in model.named_parameters() if "_proj" in name]
    seen, is_whole = [], True
    while len(seen) < count:
        with shared.reading() as version:
            values = {float(weight[:, 0].min()) for weight in weights}
            time.sleep(0.001)
            values |= {float(weight[:, 0].max()) for weight in weights}
        is_whole &= values == {float(version)}
        if version not in seen[-1:]:
            seen.append(version)
    return seen, is_whole


class Sampler:
    def __init__(self, model, path):
        context = torch.multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=sample, args=(other, model, path), daemon=True)
        self.process.start()
        other.close()

    def ask(self, command, timeout=20.0):
        self.connection.send((command, timeout))

    def answer(self, timeout=60):
        assert self.connection.poll(timeout), "no answer"
        return self.connection.recv()

    def logits(self, timeout=20.0):
        self.ask("logits", timeout)
        version, logits = self.answer()
        return version, torch.from_numpy(logits) if version != "TimeoutError" else logits

    @contextlib.contextmanager
    def held(self):
        """Have it read in this block; return the version that it sees."""
        self.ask("hold")
        yield self.answer()[0]
        self.connection.send("go on")
        assert self.answer() == ("let go", None)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A trainer here, a sampler there, and one copy of the weights."""
    base = served().share_memory()
    path = tmp_path_factory.mktemp("shared") / "gate"
    sampler = Sampler(base, path)
    shared = SharedWeights(path, timeout=20)
    yield adapt(base=base, paca_alpha=4), sampler, shared
    shared.close()
    sampler.process.kill()
    sampler.process.join()


def test_what_is_trained_is_what_is_sampled(world):
    """R7, R2 and R4: the merge's logits, the base where one looks, no write more."""
    model, sampler, shared = world
    before, plain = clone(model), served()
    assert sampler.logits(0.1)[1] == (
        "no columns were published for 0.1 s; no trainer has attached a model."
    )
    with pytest.raises(ValueError, match="no model is attached"):
        shared.publish()
    shared.attach(model)
    assert "has not called `publish`" in sampler.logits(0.1)[1]
    optimizer = torch.optim.AdamW(net.trained(model), lr=1e-2)
    for number in range(1, 4):
        step(model, optimizer, number)
        assert shared.publish() == number == shared.version
        # In the same memory, and training needs no write more, so nobody waits.
        with sampler.held() as version, net.counted_writes() as writes:
            assert version == number
            net.loss_of(model, net.batches()[0]).backward()
        assert writes == []
        optimizer.zero_grad()
        version, logits = sampler.logits()
        assert version == number
        plain.load_state_dict(merged(model))  # it looks: the pretrained columns are back
        assert torch.equal(logits, plain(input_ids=IDS).logits)
        assert "has not called `publish`" in sampler.logits(0.05)[1]
    shared.publish()
    assert torch.equal(sampler.logits()[1], logits)
    after = clone(model)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) or "paca_delta" in name


READ_FOR_EVER = """
import sys, time
from pacatune.sync import SharedWeights
with SharedWeights(sys.argv[1]).reading() as version:
    print(version, flush=True)
    time.sleep(100)
"""


def test_a_reader_is_waited_for_and_a_dead_one_is_not(world):
    model, sampler, shared = world
    shared.attach(model)
    optimizer = torch.optim.AdamW(net.trained(model), lr=1e-2)
    step(model, optimizer)
    number = shared.publish()
    with sampler.held():
        step(model, optimizer, 1)
        with pytest.raises(TimeoutError, match=r"a reader has not ended its pass for 0.1 s"):
            shared.publish(timeout=0.1)
    assert sampler.logits()[0] == number  # whole, as before
    assert shared.publish() == number + 1
    command = [sys.executable, "-c", READ_FOR_EVER, shared.path]
    other = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert int(other.stdout.readline()) == number + 1
    with pytest.raises(TimeoutError, match="a reader has not ended"):
        shared.publish(timeout=0.05)
    other.send_signal(signal.SIGKILL)
    other.communicate()
    assert shared.publish(timeout=20) == number + 2


def fill(model, value):
    with torch.no_grad():
        for layer in net.layers_of(model):
            layer.delta_of("default").fill_(value)


def test_readers_see_whole_updates(world):
    """Each version has its number in all trained columns, of which column 0 is one."""
    model, sampler, shared = world
    for layer in net.layers_of(model):
        layer.replace_update(
            "default", torch.zeros(layer.out_features, 1), torch.tensor([0]), paca_alpha=1.0
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer" in name:
                parameter[:, 0] = 0
        del parameter
    shared.attach(model)
    fill(model, shared.version + 1)
    shared.publish()
    sampler.ask("watch", 10)
    end = time.monotonic() + 60
    while not sampler.connection.poll() and time.monotonic() < end:
        fill(model, shared.version + 1)
        shared.publish()
        if shared.version % 5 == 0:
            model.state_dict()  # pretrained columns, which nobody must see
    seen, is_whole = sampler.answer(0)
    assert is_whole
    assert seen == sorted(seen)


def test_a_thread_that_looks_meanwhile(world):
    """It comes to the gate with the residencies' lock, and so must publishing."""
    model, _, shared = world
    shared.attach(model)
    stop, looks = threading.Event(), []

    def look():
        weights = net.layers_of(model)
        while not stop.is_set():
            looks.extend(len(layer.get_base_layer().weight) for layer in weights)
            time.sleep(1e-4)

    thread = threading.Thread(target=look)
    thread.start()
    start = time.monotonic()
    for value in range(200):
        fill(model, value)
        with contextlib.suppress(ValueError):  # the thread holds what it saw
            shared.publish(timeout=10)
    assert time.monotonic() - start < 10  # nobody has waited in vain
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    assert looks
    shared.publish()
    with pytest.raises(ValueError, match="is the trainer's; make another one"), shared.reading():
        pass


def adapted_embedding():
    return adapt(base=nn.Sequential(nn.Embedding(8, 8)).share_memory(), target_modules=["0"])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (served, "has no PaCA layers"),
        (adapt, r"q_proj': its weight is not shared: call"),
        (adapted_embedding, r"columns are written into the weights of torch.nn.Linear"),
    ],
)
def test_models_that_cannot_share(build, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SharedWeights(tmp_path / "gate").attach(build())


def test_columns_that_cannot_be_written_are_not_published(tmp_path):
    """R5: not into a weight that somebody holds, nor while the adapters are off."""
    shared, model = SharedWeights(tmp_path / "gate"), adapt(base=served().share_memory())
    shared.attach(model)
    held = [parameter.detach() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"q_proj.*: somebody holds a tensor in the memory"):
        shared.publish()
    del held
    with model.disable_adapter(), pytest.raises(ValueError, match="its adapters are disabled"):
        shared.publish()
    assert shared.publish() == 1
    shared.close()
    assert not any(layer.residency.is_written for layer in net.layers_of(model))


def test_another_file_is_no_gate(tmp_path):
    (tmp_path / "other").write_text("something else")
    with pytest.raises(ValueError, match="is another file; choose a path"):
        SharedWeights(tmp_path / "other")
    assert (tmp_path / "other").read_text() == "something else"


def test_a_forked_object_is_refused(tmp_path):
    shared = SharedWeights(tmp_path / "gate")
    shared._process = os.getpid() + 1
    with pytest.raises(ValueError, match="belongs to another process"), shared.closed():
        pass


def test_threads_read_together(tmp_path):
    shared, other = SharedWeights(tmp_path / "gate"), SharedWeights(tmp_path / "gate")
    with shared.closed():
        shared._set(1, 1)
    with shared.reading(), shared.reading():
        pass
    with shared.reading():
        with shared.reading():
            pass
        with pytest.raises(TimeoutError, match="a reader has not"), other.closed(timeout=0.02):
            pass
    with other.closed(timeout=5):
        pass
