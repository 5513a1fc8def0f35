"""Number formats and the device: their names, and which the device computes in fast.

This module imports torch only where a function needs it.
"""

import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pacatune.names import choose

if TYPE_CHECKING:
    import torch

Dtype = Literal["auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]
"""What options of a number format take; `auto` is left to the checkpoint or the device."""

FLOATS = ("float64", "float32", "bfloat16", "float16")
"""Formats of weights that are plain numbers; others are quantised."""

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.I)


def choose_device(name: str) -> "torch.device":
    """Return a device of this machine by its name, such as `cuda:1`; `auto`: any accelerator."""
    import torch

    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    if name == "auto":
        return accelerator or torch.device("cpu")
    there = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"`device` ({name!r}) is unknown to torch; choose {there} or auto."
        ) from error
    count = torch.accelerator.device_count() if accelerator is not None else 0
    if device.type != "cpu" and (
        accelerator is None or device.type != accelerator.type or (device.index or 0) >= count
    ):
        raise ValueError(f"`device` ({name!r}) is not on this machine; choose {there} or auto.")
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ended, in the words of any device."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


_tried: dict[tuple[Any, ...], bool] = {}


def kernel_works(what: str, otherwise: str, trial: Callable[..., None], *kind: Any) -> bool:
    """Whether one of Triton's kernels does what torch does on a device; tried once for each kind.

    Args:
        what: What it does, for the warning that it fails.
        otherwise: What is done then.
        trial: Raises an error where it fails.
        *kind: What `trial` takes; the device first.
    """
    key = (what, *kind)
    if key not in _tried:
        try:
            trial(*kind)
            _tried[key] = True
        except Exception as error:
            if is_out_of_memory(error):  # there may be enough another time
                return False
            _tried[key] = False
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            message = f"Triton's kernel, which {what}, fails on {kind[0]} ({reason}); {otherwise}."
            warnings.warn(message, stacklevel=3)
    return _tried[key]


def torch_dtype(name: str, *, option: str = "dtype") -> "torch.dtype":
    """Return torch's object of a number format; a wrong name is an error that calls it `option`."""
    import torch

    dtype: torch.dtype = getattr(torch, choose(name, FLOATS, option=option))
    return dtype


def dtype_name(dtype: "torch.dtype") -> str:
    """Return the name of a number format, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def bfloat16_is_fast(*, use_cpu: bool = False) -> bool:
    """Whether the device that training would use multiplies bfloat16 matrices in hardware."""
    import torch

    if torch.accelerator.is_available() and not use_cpu:
        device = torch.accelerator.current_accelerator()
        assert device is not None
        if device.type == "cuda":
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        return device.type == "xpu"
    if torch.backends.cpu.get_cpu_capability() == "AVX2":  # as ATEN_CPU_CAPABILITY may limit it
        return False
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    names = ("avx512_bf16", "amx_bf16", "amx_tile", "bf16")
    return any(capabilities.get(name) for name in names) or bool(
        torch.cpu._is_avx512_bf16_supported()
    )


def choose_dtype(
    dtype: Dtype, checkpoint: "torch.dtype | None", *, full: bool, use_cpu: bool
) -> "torch.dtype":
    """Return the type in which training holds the weights of a model.

    bfloat16 loses small updates, so `auto` is float32 where every weight is trained (`full`), and
    where the type on disk (`checkpoint`) is unknown.
    """
    import torch

    if dtype != "auto":
        return torch_dtype(dtype)
    if full or checkpoint is None:
        return torch.float32
    on_cpu = use_cpu or not torch.accelerator.is_available()
    if checkpoint == torch.float16:
        return torch.float32 if on_cpu else torch.float16
    if checkpoint == torch.bfloat16 and not bfloat16_is_fast(use_cpu=use_cpu):
        return torch.float32
    return checkpoint
