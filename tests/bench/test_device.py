"""Devices of any maker: what torch tells of them, and what it does not."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from pacatune.bench import device
from pacatune.bench.device import PeakMemory, choose_device, is_out_of_memory, limit_memory

XPU = torch.device("xpu", 0)


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
        with pytest.raises(ValueError, match="is not on this machine; here are cpu and xpu"):
            choose_device(absent)
    device.synchronize(XPU)
    assert device.device_name(XPU) == "Some XPU"
    assert device.available_bytes(XPU) == 60
    memory = PeakMemory(XPU)
    memory.reset()
    assert memory.to_dict() == {
        "peak_bytes": 7,
        "peak_reserved_bytes": 9,
        "peak_of": "the allocator",
    }
    assert accelerator.calls == [("synchronize", XPU), ("reset", XPU)]


def test_an_allocator_without_an_account_is_said_to_have_none(accelerator):
    def refuse(where):
        raise RuntimeError("not supported")

    for name in (
        "max_memory_allocated",
        "max_memory_reserved",
        "reset_peak_memory_stats",
        "get_memory_info",
    ):
        setattr(accelerator.fake, name, refuse)
    memory = PeakMemory(XPU)
    memory.reset()
    assert memory.to_dict() == {
        "peak_bytes": None,
        "peak_reserved_bytes": None,
        "peak_of": "nothing: torch does not tell",
    }
    assert device.available_bytes(XPU) is None
    accelerator.memory.max_memory_allocated = lambda where: 5  # as HPUs have it
    assert memory.to_dict()["peak_bytes"] == 5


def test_memory_of_an_accelerator_is_limited_by_its_share(accelerator):
    limit_memory(25, XPU)
    assert accelerator.calls == [("limit", 0.25)]
    del accelerator.memory.set_per_process_memory_fraction
    with pytest.raises(ValueError, match="torch cannot limit the memory of xpu:0"):
        limit_memory(25, XPU)


def test_memory_of_a_cpu_is_limited_on_linux_only(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "_STATUS", tmp_path / "none")
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


def test_a_cpu_has_a_name_and_free_memory():
    assert device.device_name(torch.device("cpu"))
    assert device.available_bytes(torch.device("cpu")) > 2**20


def test_the_peak_of_a_cpu_is_what_was_there_at_once():
    # In a process of its own: what others have freed here would be given back in between.
    code = """
import torch
from pacatune.bench.device import PeakMemory
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
