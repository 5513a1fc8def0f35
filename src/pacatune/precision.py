"""Number formats: their names, which the device computes in fast, and which weights are held in.

This module imports torch only where a function needs it.
"""

from typing import TYPE_CHECKING, Literal, get_args

from pacatune.names import choose

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "Dtype", "bfloat16_is_fast", "choose_dtype", "dtype_name", "torch_dtype"]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(Dtype)
"""What options of a number format take; `auto` is left to the checkpoint or the device."""

_NAMES = ("float64", "float32", "bfloat16", "float16")


def torch_dtype(name: str, *, option: str = "dtype") -> "torch.dtype":
    """Return torch's object of a number format.

    Args:
        name: float64, float32, bfloat16 or float16.
        option: Where the name is from, for the message.

    Raises:
        ValueError: If it is none of them; names the nearest.
    """
    import torch

    dtype: torch.dtype = getattr(torch, choose(name, _NAMES, option=option))
    return dtype


def dtype_name(dtype: "torch.dtype") -> str:
    """Return the name of a number format, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def bfloat16_is_fast(*, use_cpu: bool = False) -> bool:
    """Whether the device that training would use multiplies bfloat16 matrices in hardware.

    Args:
        use_cpu: Whether training is told to use the CPU.
    """
    import torch

    if torch.accelerator.is_available() and not use_cpu:
        device = torch.accelerator.current_accelerator()
        assert device is not None
        if device.type == "cuda":
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        return device.type == "xpu"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    names = ("avx512_bf16", "amx_bf16", "amx_tile", "bf16")
    return any(capabilities.get(name) for name in names) or bool(
        torch.cpu._is_avx512_bf16_supported()
    )


def choose_dtype(
    dtype: Dtype, checkpoint: "torch.dtype | None", *, full: bool, use_cpu: bool
) -> "torch.dtype":
    """Return the type in which the weights of a model are held in training.

    Args:
        dtype: The user's choice.
        checkpoint: Type of the weights on disk, float32 where unknown.
        full: Whether every weight is trained. bfloat16 loses small updates, so `auto` is then
            float32.
        use_cpu: Whether training is told to use the CPU.
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
