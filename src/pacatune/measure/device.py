"""The device, whichever it is: its clock, its memory and its name; and the memory of known GPUs."""

import contextlib
import ctypes
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from pacatune.names import guess
from pacatune.reports.provenance import cpu_name

# `torch.cuda.get_device_properties().total_memory` in GiB, as PyTorch's out-of-memory messages in
# public bug reports state it ("GPU 0 has a total capacity of 79.10 GiB"): the card's memory less
# what the driver keeps. Drivers differ by some hundredths; a common smaller number is taken.
GPU_GIB: dict[str, float] = {
    "t4": 14.75,
    "l4": 22.03,
    "a10g": 22.06,
    "3090": 23.68,
    "4090": 23.64,
    "5090": 31.36,
    "a100-40g": 39.39,
    "l40s": 44.39,
    "a6000": 47.53,
    "a100-80g": 79.15,
    "h100": 79.10,
    "h200": 139.80,
    "b200": 178.35,
}
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
# A smaller number without a unit is likely meant otherwise.
_LEAST_WITHOUT_UNIT = 2**20


def device_name(device: torch.device) -> str:
    """Return the name that the maker gave it."""
    if device.type == "cpu":
        return cpu_name()
    get_name = getattr(torch.get_device_module(device), "get_device_name", str)
    return str(get_name(device))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Stopwatch:
    """Notes moments in a device's work.

    On CUDA by events, which the device notes when it comes to them: nothing waits for it but
    `seconds`. Elsewhere each mark waits for the device, and reads the clock.
    """

    def __init__(
        self, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._device, self._clock = device, clock
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note that everything given to the device so far is done."""
        if has_events(self._device):
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            synchronize(self._device)
            self._marks.append(self._clock())

    def seconds(self) -> tuple[float, ...]:
        """Wait for the last mark; return the time between each mark and the next."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if not has_events(self._device):
            return tuple(end - start for start, end in pairs)
        self._marks[-1].synchronize()
        return tuple(1e-3 * start.elapsed_time(end) for start, end in pairs)


def has_events(device: torch.device) -> bool:
    """Whether a device itself notes the time of its work."""
    return device.type == "cuda"


def limit_memory(num_bytes: int, device: torch.device) -> None:
    """Let this process take so much memory from now on (on an accelerator: in all), then fail."""
    if device.type == "cpu":
        if sys.platform != "linux":
            raise ValueError("`memory_limit` on a CPU needs Linux; leave it out.")
        import resource  # not on every system

        limit = psutil.Process().memory_info().data + num_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        return
    module: Any = torch.get_device_module(device)
    if not hasattr(module, "set_per_process_memory_fraction"):
        raise ValueError(
            f"`memory_limit`: torch cannot limit the memory of {device}; leave it out."
        )
    total = torch.accelerator.get_memory_info(device)[1]
    module.set_per_process_memory_fraction(min(1.0, num_bytes / total), device)


def peak_process_bytes() -> int:
    """Return the largest resident size that this process has had, or had since the last reset."""
    # Not getrusage on Linux: it counts what the parent held when it started this process.
    status = Path("/proc/self/status")
    text = status.read_text(encoding="utf-8") if status.is_file() else ""
    if found := re.search(r"^VmHWM:\s+(\d+)", text, re.MULTILINE):
        return int(found[1]) * 1024
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_process_bytes() -> None:
    """Let `peak_process_bytes` start anew from what the process holds now, where Linux can."""
    # Elsewhere, and in sandboxes that forbid it, the peak stays that of the whole process.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class PeakMemory:
    """The most memory that training takes: make it before the model.

    An accelerator's allocator counts by itself. On a CPU it is the resident set beyond what the
    process had at the start, which the kernel counts by pages; files and shared memory are in it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, psutil.Process().memory_info().rss

    def reset(self) -> None:
        """Forget the peak so far, that of building the model for instance."""
        if self._device.type != "cpu":
            _try(torch.accelerator.reset_peak_memory_stats, self._device)
        elif sys.platform == "linux":
            # What has been freed may still be the process's; the model was built of it.
            ctypes.CDLL(None).malloc_trim(0)
            reset_peak_process_bytes()

    def to_dict(self) -> dict[str, int | None]:
        """Return `peak_bytes` since the last reset, and `peak_reserved_bytes` of an allocator.

        They are None where torch does not tell.
        """
        if self._device.type == "cpu":
            return {"peak_bytes": peak_process_bytes() - self._before}
        allocated = _try(torch.accelerator.max_memory_allocated, self._device)
        module: Any = torch.get_device_module(self._device)
        if allocated is None and hasattr(module, "max_memory_allocated"):
            allocated = module.max_memory_allocated(self._device)
        reserved = _try(torch.accelerator.max_memory_reserved, self._device)
        return {"peak_bytes": allocated, "peak_reserved_bytes": reserved}


def _try(function: Any, device: torch.device) -> Any:
    """Return what an accelerator's allocator says, None where it keeps no such account."""
    try:
        return function(device)
    except (RuntimeError, NotImplementedError):
        return None


def gpu_bytes(name: str) -> int:
    """Return the memory of one of `GPU_GIB` that PyTorch can use; refuse others."""
    if name.lower() not in GPU_GIB:
        hint = guess(name.lower(), GPU_GIB, cutoff=0.4) or "none is like it. "
        raise ValueError(
            f"unknown GPU {name!r}; {hint}Known are {', '.join(GPU_GIB)}; for another give its "
            "memory, such as `--memory 24GiB`."
        )
    return int(GPU_GIB[name.lower()] * 2**30)


def parse_bytes(text: str, option: str = "memory") -> int:
    """Return the bytes that a text such as `24GiB`, `16 GB` or `8589934592` names."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?\s*", text.lower())
    unit = _UNITS.get(match[2] or "b") if match else None
    num_bytes = int(float(match[1]) * unit) if match and unit else 0
    if num_bytes < (1 if match and match[2] else _LEAST_WITHOUT_UNIT):
        raise ValueError(
            f"`{option}` ({text!r}) is no amount of memory; write a number above 0 and a unit, "
            "such as 24GiB (2^30) or 24GB (10^9)."
        )
    return num_bytes
