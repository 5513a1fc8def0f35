"""The memory of known GPUs, amounts of memory as texts, and the peak of this process."""

import contextlib
import re
import sys
from pathlib import Path

from pacatune.names import guess

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


def peak_process_bytes() -> int:
    """Return the largest resident size that this process has had, or had since the last reset."""
    # Not getrusage on Linux: it counts what the parent held when it started this process.
    status = Path("/proc/self/status")
    text = status.read_text(encoding="utf-8") if status.is_file() else ""
    if match := re.search(r"^VmHWM:\s+(\d+)", text, re.MULTILINE):
        return int(match[1]) * 1024
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_process_bytes() -> None:
    """Let `peak_process_bytes` start anew from what the process holds now, where Linux can."""
    # Elsewhere, and in sandboxes that forbid it, the peak stays that of the whole process.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def gpu_bytes(name: str) -> int:
    """Return the memory of one of `GPU_GIB` that PyTorch can use; refuse others."""
    if name.lower() not in GPU_GIB:
        hint = guess(name.lower(), GPU_GIB, cutoff=0.4) or "none is like it. "
        raise ValueError(
            f"unknown GPU {name!r}; {hint}Known are {', '.join(GPU_GIB)}; for another give its "
            "memory, such as `--memory 24GiB`."
        )
    return int(GPU_GIB[name.lower()] * 2**30)


def parse_bytes(text: str) -> int:
    """Return the bytes that a text such as `24GiB`, `16 GB` or `8589934592` names."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?\s*", text.lower())
    unit = _UNITS.get(match[2] or "b") if match else None
    num_bytes = int(float(match[1]) * unit) if match and unit else 0
    if num_bytes < (1 if match and match[2] else _LEAST_WITHOUT_UNIT):
        raise ValueError(
            f"`memory` ({text!r}) is no amount of memory; write a number above 0 and a unit, "
            "such as 24GiB (2^30) or 24GB (10^9)."
        )
    return num_bytes
