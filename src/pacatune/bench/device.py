"""Clock, memory and name of the device, whichever it is; nothing here is of one maker alone."""

import ctypes
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pacatune.bench.record import cpu_name
from pacatune.memory.measure import peak_process_bytes

__all__ = [
    "PeakMemory",
    "available_bytes",
    "choose_device",
    "device_name",
    "is_out_of_memory",
    "limit_memory",
    "synchronize",
]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.I)


def choose_device(name: str) -> torch.device:
    """Return the device of a name such as `cpu` or `cuda:1`; of `auto` the accelerator if any.

    Raises:
        ValueError: If torch does not know it, or there is none.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return found or torch.device("cpu")
    there = "cpu" if found is None else f"cpu and {found.type}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`device` ({name!r}) is unknown to torch; here are {there}.") from error
    count = torch.accelerator.device_count() if found is not None else 0
    if device.type != "cpu" and (
        found is None or device.type != found.type or (device.index or 0) >= count
    ):
        raise ValueError(f"`device` ({name!r}) is not on this machine; here are {there}.")
    return device


def device_name(device: torch.device) -> str:
    """Return the name that the maker gave it."""
    if device.type == "cpu":
        return cpu_name()
    module: Any = torch.get_device_module(device)
    return (
        str(module.get_device_name(device)) if hasattr(module, "get_device_name") else str(device)
    )


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ended, in the words of any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def available_bytes(device: torch.device) -> int | None:
    """Return how much memory is free, None where nobody says."""
    if device.type != "cpu":
        try:
            return int(torch.accelerator.get_memory_info(device)[0])
        except (RuntimeError, NotImplementedError):
            return None
    return _read_kib(Path("/proc/meminfo"), "MemAvailable")


def limit_memory(num_bytes: int, device: torch.device) -> None:
    """Let this process take so much memory from now on, and fail beyond.

    Args:
        num_bytes: On a CPU beyond what the process has already; on an accelerator in all.
        device: Whose memory.

    Raises:
        ValueError: If the system or the device cannot limit it.
    """
    if device.type == "cpu":
        used = _read_kib(_STATUS, "VmData")
        if used is None:
            raise ValueError("`memory_limit` on a CPU needs Linux; leave it out.")
        import resource

        limit = used + num_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        return
    module: Any = torch.get_device_module(device)
    if not hasattr(module, "set_per_process_memory_fraction"):
        raise ValueError(
            f"`memory_limit`: torch cannot limit the memory of {device}; leave it out."
        )
    total = torch.accelerator.get_memory_info(device)[1]
    module.set_per_process_memory_fraction(min(1.0, num_bytes / total), device)


@dataclass
class PeakMemory:
    """The most memory that training takes: start it before the model is there.

    An accelerator's allocator counts by itself. On a CPU it is the resident set beyond what the
    process had at the start, which the kernel counts by pages; files and shared memory are in it.

    Args:
        device: Whose memory.
    """

    device: torch.device

    def __post_init__(self) -> None:
        self._before = 0 if self.device.type != "cpu" else _resident_bytes() or 0

    def reset(self) -> None:
        """Forget the peak so far, that of building the model for instance."""
        if self.device.type != "cpu":
            _try(torch.accelerator.reset_peak_memory_stats, self.device)
            return
        if sys.platform == "linux":
            # What has been freed may still be the process's; the model was built of it.
            ctypes.CDLL(None).malloc_trim(0)
            _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")

    def to_dict(self) -> dict[str, Any]:
        """Return `peak_bytes`, what it was `peak_of`, and an allocator's `peak_reserved_bytes`."""
        if self.device.type == "cpu":
            return {
                "peak_bytes": peak_process_bytes() - self._before,
                "peak_of": "resident set beyond that of the process before the model",
            }
        allocated = _try(torch.accelerator.max_memory_allocated, self.device)
        module: Any = torch.get_device_module(self.device)
        if allocated is None and hasattr(module, "max_memory_allocated"):
            allocated = module.max_memory_allocated(self.device)
        return {
            "peak_bytes": allocated,
            "peak_reserved_bytes": _try(torch.accelerator.max_memory_reserved, self.device),
            "peak_of": "the allocator" if allocated is not None else "nothing: torch does not tell",
        }


def _try(function: Any, device: torch.device) -> Any:
    """What an accelerator's allocator says, None where it keeps no such account."""
    try:
        return function(device)
    except (RuntimeError, NotImplementedError):
        return None


def _resident_bytes() -> int | None:
    return _read_kib(_STATUS, "VmRSS") or (
        peak_process_bytes() if sys.platform != "linux" else None
    )


def _read_kib(path: Path, name: str) -> int | None:
    if not path.is_file():
        return None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
