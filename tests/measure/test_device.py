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
    is_out_of_memory,
    limit_memory,
    parse_bytes,
)
from pacatune.precision import choose_device

XPU = torch.device("xpu", 0)
CUDA = torch.device("cuda", 0)


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
    assert choose_device("cpu") == torch.device("cpu")
    for absent in ("xpu:1", "cuda"):
        with pytest.raises(ValueError, match="is not on this machine; choose cpu, xpu or auto"):
            choose_device(absent)
    device.synchronize(XPU)
    assert device.device_name(XPU) == "Some XPU"
    memory = PeakMemory(XPU)
    memory.reset()
    assert memory.to_dict() == {"peak_bytes": 7, "peak_reserved_bytes": 9}
    assert accelerator.calls == [("synchronize", XPU), ("reset", XPU)]


def test_an_allocator_without_an_account_is_said_to_have_none(accelerator):
    def refuse(where):
        raise RuntimeError("not supported")

    for name in (
        "max_memory_allocated",
        "max_memory_reserved",
        "reset_peak_memory_stats",
    ):
        setattr(accelerator.fake, name, refuse)
    memory = PeakMemory(XPU)
    memory.reset()
    assert memory.to_dict() == {"peak_bytes": None, "peak_reserved_bytes": None}
    accelerator.memory.max_memory_allocated = lambda where: 5  # as HPUs have it
    assert memory.to_dict()["peak_bytes"] == 5


def test_memory_of_an_accelerator_is_limited_by_its_share(accelerator):
    limit_memory(25, XPU)
    assert accelerator.calls == [("limit", 0.25)]
    del accelerator.memory.set_per_process_memory_fraction
    with pytest.raises(ValueError, match="torch cannot limit the memory of xpu:0"):
        limit_memory(25, XPU)


def test_memory_of_a_cpu_is_limited_on_linux_only(monkeypatch):
    monkeypatch.setattr(device.sys, "platform", "win32")
    with pytest.raises(ValueError, match="`memory_limit` on a CPU needs Linux"):
        limit_memory(2**30, torch.device("cpu"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_the_end_of_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) is expected


def test_a_cpu_has_a_name():
    assert device.device_name(torch.device("cpu"))


def test_the_peak_of_a_cpu_is_what_was_there_at_once():
    # In a process of its own: what others have freed here would be given back in between.
    code = """
import torch
from pacatune.measure.device import PeakMemory
memory = PeakMemory(torch.device("cpu"))
torch.ones(60 * 2**18)
memory.reset()
kept = torch.ones(20 * 2**18)
print(memory.to_dict()["peak_bytes"])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # The kernel counts the pages of a process now and then.
    assert 19 * 2**20 <= int(run.stdout) < 50 * 2**20


def test_a_device_without_a_name_is_called_as_torch_does(accelerator):
    del accelerator.memory.get_device_name
    assert device.device_name(XPU) == "xpu:0"


def test_peak_of_the_process_grows_with_what_it_holds():
    code = (
        "from pacatune.measure.device import peak_process_bytes\n"
        "before = peak_process_bytes()\n"
        "block = bytearray(300 * 2**20)\n"
        "block[::4096] = b'x' * len(block[::4096])\n"
        "print(peak_process_bytes() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 250 * 2**20 < int(done.stdout) < 350 * 2**20
    assert device.peak_process_bytes() > 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot forget a peak")
def test_peak_of_the_process_can_start_anew():
    code = (
        "from pacatune.measure.device import peak_process_bytes, reset_peak_process_bytes\n"
        "before = peak_process_bytes()\n"
        "block = bytearray(300 * 2**20)\n"
        "block[::4096] = b'x' * len(block[::4096])\n"
        "del block\n"
        "reset_peak_process_bytes()\n"
        "print(peak_process_bytes() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50 * 2**20


def test_every_gpu_gives_less_than_its_name_says():
    assert gpu_bytes("a100-80g") < 80 * 2**30
    assert gpu_bytes("A100-40G") < 40 * 2**30
    assert all(gpu_bytes(name) == int(size * 2**30) for name, size in GPU_GIB.items())


def test_unknown_gpu_suggests_the_nearest():
    with pytest.raises(ValueError, match="unknown GPU 'a100-80gb'; did you mean 'a100-80g'"):
        gpu_bytes("a100-80gb")
    with pytest.raises(ValueError, match=r"unknown GPU 'xyz'; none is like it\. Known are t4"):
        gpu_bytes("xyz")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", 24 * 2**30),
        ("24 gb", 24 * 10**9),
        ("1.5TiB", 3 * 2**39),
        ("512MiB", 2**29),
        ("100B", 100),
        (str(4 * 2**30), 4 * 2**30),
    ],
)
def test_amounts(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["24", "1000", "GiB", "-1GiB", "0GiB", "24G", "1e3MiB", "24 GiBs", ""]
)
def test_what_is_no_amount(text):
    with pytest.raises(ValueError, match=r"`memory` .* is no amount of memory; write a number"):
        parse_bytes(text)


class Event:
    """A CUDA event: noted when recorded, reached by the device when it is waited for."""

    reached = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.time = stream.pop(0)

    def query(self):
        return Event.reached >= self.time

    def synchronize(self):
        Event.reached = self.time

    def elapsed_time(self, end):
        return end.time - self.time


def test_a_stopwatch_waits_for_cuda_when_it_is_read(monkeypatch):
    times = [100, 350, 400]
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: times)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *args: pytest.fail("waited"))
    watch = Stopwatch(CUDA)
    for _ in range(3):
        watch.mark()
    assert watch.seconds() == (0.25, 0.05)


def test_a_stopwatch_reads_the_clock_elsewhere(accelerator, monkeypatch):
    times = iter([1.0, 3.5, 4.0])
    watch = Stopwatch(XPU, lambda: next(times))
    for _ in range(3):
        watch.mark()
    assert watch.seconds() == (2.5, 0.5)
    assert accelerator.calls == [("synchronize", XPU)] * 3
