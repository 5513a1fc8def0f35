"""Devices of any maker: what torch tells of them, and what it does not."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from pacatune.measure import device
from pacatune.measure.device import (
    GPU_GIB,
    PeakMemory,
    Stopwatch,
    gpu_bytes,
    limit_memory,
    parse_bytes,
)
from pacatune.precision import choose_device

XPU, CPU = torch.device("xpu", 0), torch.device("cpu")


@pytest.fixture
def accelerator(monkeypatch):
    """An accelerator that torch knows of, as far as these functions look at it."""
    calls = []
    memory = SimpleNamespace(
        set_per_process_memory_fraction=lambda share, where: calls.append(("limit", share)),
        get_device_name=lambda where: "Some XPU",
    )
    fake = SimpleNamespace(
        is_available=lambda: True,
        current_accelerator=lambda: XPU,
        device_count=lambda: 1,
        synchronize=lambda where: calls.append(("synchronize", where)),
        get_memory_info=lambda where: (60, 100),
        reset_peak_memory_stats=lambda where: calls.append(("reset", where)),
        max_memory_allocated=lambda where: 7,
        max_memory_reserved=lambda where: 9,
    )
    monkeypatch.setattr(torch, "accelerator", fake)
    monkeypatch.setattr(torch, "get_device_module", lambda where: memory)
    return SimpleNamespace(calls=calls, memory=memory, fake=fake)


def test_an_accelerator_is_taken_waited_for_and_measured(accelerator):
    assert choose_device("auto") == XPU
    assert choose_device("xpu") == torch.device("xpu")
    assert choose_device("cpu") == CPU
    for absent in ("xpu:1", "cuda"):
        with pytest.raises(ValueError, match="is not on this machine; choose cpu, xpu or auto"):
            choose_device(absent)
    device.synchronize(XPU)
    assert device.device_name(XPU) == "Some XPU"
    memory = PeakMemory(XPU)
    memory.reset()
    assert memory.to_dict() == {"peak_bytes": 7, "peak_reserved_bytes": 9}
    limit_memory(25, XPU)
    assert accelerator.calls == [("synchronize", XPU), ("reset", XPU), ("limit", 0.25)]


def test_what_an_accelerator_does_not_tell(accelerator, monkeypatch):
    def refuse(where):
        raise RuntimeError("not supported")

    for name in ("max_memory_allocated", "max_memory_reserved", "reset_peak_memory_stats"):
        setattr(accelerator.fake, name, refuse)
    memory = PeakMemory(XPU)
    memory.reset()
    assert memory.to_dict() == {"peak_bytes": None, "peak_reserved_bytes": None}
    accelerator.memory.max_memory_allocated = lambda where: 5  # as HPUs have it
    assert memory.to_dict()["peak_bytes"] == 5
    del accelerator.memory.get_device_name, accelerator.memory.set_per_process_memory_fraction
    assert device.device_name(XPU) == "xpu:0"
    with pytest.raises(ValueError, match="torch cannot limit the memory of xpu:0"):
        limit_memory(25, XPU)
    monkeypatch.setattr(device.sys, "platform", "win32")
    with pytest.raises(ValueError, match="`memory_limit` on a CPU needs Linux"):
        limit_memory(2**30, CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot forget a peak")
def test_peaks_of_a_process_are_what_was_there_at_once():
    # In a process of its own: what others have freed here would be given back in between.
    code = """
import torch
from pacatune.measure.device import PeakMemory, peak_process_bytes, reset_peak_process_bytes
before = peak_process_bytes()
torch.ones(75 * 2**20)
print(peak_process_bytes() - before)
reset_peak_process_bytes()
print(peak_process_bytes() - before)
memory = PeakMemory(torch.device("cpu"))
torch.ones(60 * 2**18)
memory.reset()
kept = torch.ones(20 * 2**18)
print(memory.to_dict()["peak_bytes"])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, anew, kept = (int(line) / 2**20 for line in run.stdout.split())
    assert 250 < peak < 350
    # The kernel counts the pages of a process now and then.
    assert anew < 50
    assert 19 <= kept < 50


def test_every_gpu_gives_less_than_its_name_says():
    assert gpu_bytes("A100-40G") < 40 * 2**30
    assert all(gpu_bytes(name) == int(size * 2**30) for name, size in GPU_GIB.items())
    with pytest.raises(ValueError, match="unknown GPU 'a100-80gb'; did you mean 'a100-80g'"):
        gpu_bytes("a100-80gb")
    with pytest.raises(ValueError, match=r"unknown GPU 'xyz'; none is like it\. Known are t4"):
        gpu_bytes("xyz")


def test_amounts_of_memory():
    amounts = {"24GiB": 24 * 2**30, "24 gb": 24 * 10**9, "1.5TiB": 3 * 2**39, "512MiB": 2**29}
    amounts |= {"100B": 100, str(4 * 2**30): 4 * 2**30}
    assert {text: parse_bytes(text) for text in amounts} == amounts
    for text in ("24", "1000", "GiB", "-1GiB", "0GiB", "24G", "1e3MiB", "24 GiBs", ""):
        with pytest.raises(ValueError, match=r"`memory` .* is no amount of memory; write a number"):
            parse_bytes(text)


class Event:
    """A CUDA event: noted when recorded, reached by the device when it is waited for."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.time = next(stream)

    def synchronize(self):
        Event.reached = self.time

    def elapsed_time(self, end):
        assert Event.reached >= end.time
        return end.time - self.time


@pytest.mark.parametrize(("kind", "num_waits"), [("cuda", 0), ("xpu", 3)])
def test_a_stopwatch_waits_for_cuda_when_it_is_read_elsewhere_at_each_mark(
    accelerator, monkeypatch, kind, num_waits
):
    where, times = torch.device(kind, 0), iter([100, 350, 400])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: times)
    watch = Stopwatch(where, lambda: next(times) / 1000)
    for _ in range(3):
        watch.mark()
    assert watch.seconds() == pytest.approx((0.25, 0.05))
    assert accelerator.calls == [("synchronize", where)] * num_waits
