"""Which number formats the device computes in fast."""

from typing import Literal

import torch

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def bfloat16_is_fast(*, use_cpu: bool = False) -> bool:
    """Whether the device that training would use multiplies bfloat16 matrices in hardware.

    Args:
        use_cpu: Whether training is told to use the CPU.
    """
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
    dtype: Dtype, checkpoint: torch.dtype | None, *, full: bool, use_cpu: bool
) -> torch.dtype:
    """Return the type in which the weights of the model are held.

    Args:
        dtype: The user's choice.
        checkpoint: Type of the weights on disk, float32 where unknown.
        full: Whether every weight is trained. bfloat16 loses small updates, so `auto` is then
            float32.
        use_cpu: Whether training is told to use the CPU.
    """
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    if full or checkpoint is None:
        return torch.float32
    on_cpu = use_cpu or not torch.accelerator.is_available()
    if checkpoint == torch.float16:
        return torch.float32 if on_cpu else torch.float16
    if checkpoint == torch.bfloat16 and not bfloat16_is_fast(use_cpu=use_cpu):
        return torch.float32
    return checkpoint
