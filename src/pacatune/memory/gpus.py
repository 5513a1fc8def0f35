"""How many bytes a GPU gives to PyTorch, and sizes as people write them."""

import re

from pacatune.names import guess

__all__ = ["GPU_GIB", "gpu_bytes", "parse_bytes"]

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


def gpu_bytes(name: str) -> int:
    """Return the memory of a GPU that PyTorch can use, in bytes.

    Args:
        name: One of `GPU_GIB`.

    Raises:
        ValueError: If it is unknown; names the nearest.
    """
    if name.lower() not in GPU_GIB:
        hint = guess(name.lower(), GPU_GIB, cutoff=0.4)
        raise ValueError(
            f"unknown GPU {name!r}; {hint}Known are {', '.join(GPU_GIB)}; for another give its "
            "memory, such as `--memory 24GiB`."
        )
    return int(GPU_GIB[name.lower()] * 2**30)


def parse_bytes(text: str) -> int:
    """Return the bytes that a text such as `24GiB` or `16 GB` names.

    Raises:
        ValueError: If it names none, or nothing above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b)\s*", text.lower())
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise ValueError(
            f"{text!r} is no amount of memory; write a number above 0 and a unit, such as 24GiB "
            "(2^30) or 24GB (10^9)."
        )
    return int(float(match[1]) * _UNITS[match[2]])
