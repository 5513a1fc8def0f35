"""Several CUDA streams at once: who reads a weight, and who writes it, wait for each other.

Streams stand in that know what they have waited for; their work is noted, and done at once.
"""

import pytest
import torch

from pacatune.residency import put
from pacatune.residency.reading import read
from tests.residency.net import deltas, layers


class Stream:
    def __init__(self):
        self.queued: list[str] = []

    def wait_stream(self, other):
        self.queued += [work for work in other.queued if work not in self.queued]


class Streams:
    """A default stream, two others, and which of them is current."""

    def __init__(self):
        self.default, self.first, self.second = (Stream() for _ in range(3))
        self.current = self.default
        self.num_writes = self.num_reads = 0

    def write(self, *args):
        self.num_writes += 1
        self.before = [*self.current.queued]  # what is over when the columns change
        self.current.queued.append(f"write {self.num_writes}")
        self.put_columns_(*args)

    def compute(self, weight, is_resident):
        self.num_reads += 1
        self.before = [*self.current.queued]
        self.current.queued.append(f"read {self.num_reads}")


@pytest.fixture(name="streams")
def _streams(monkeypatch):
    streams = Streams()
    streams.put_columns_ = put.put_columns_
    monkeypatch.setattr(put, "put_columns_", streams.write)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams.current)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: streams.default)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for module in ("put", "reading"):
        name = f"pacatune.residency.{module}.is_aside"
        monkeypatch.setattr(name, lambda memory: streams.current is not streams.default)
    return streams


@pytest.mark.parametrize("trainer", ["default", "first"])
def test_evaluation_on_a_stream_of_its_own(model, x, streams, trainer):
    """Queued on the host in the order of the calls; on the device, too."""
    layer, optimizer = layers(model)[0], torch.optim.SGD(deltas(model), lr=0.1)
    for _ in range(3):
        streams.current = streams.second
        read(layer.residency, streams.compute, layer._single_update(), writes=False)
        assert {f"write {n + 1}" for n in range(streams.num_writes)} <= {*streams.before}
        streams.current = getattr(streams, trainer)
        model(x).square().sum().backward()
        assert f"read {streams.num_reads}" in streams.before
        optimizer.step()


def test_nobody_waits_on_the_default_stream(model, x, streams, monkeypatch):
    monkeypatch.setattr(Stream, "wait_stream", lambda *streams: pytest.fail("waits"))
    model(x).square().sum().backward()
    assert streams.num_writes


def test_what_is_recorded_for_a_graph_waits_for_nobody(streams, monkeypatch):
    monkeypatch.setattr(Stream, "wait_stream", lambda *streams: pytest.fail("waits"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    streams.current = streams.first
    with put.in_turn(torch.ones(2)):
        pass
