"""One launch that puts the columns of any number of weights: a kernel that reads their addresses.

On a GPU a launch takes longer than the columns of a layer, and each layer would need three: the
sum, its rounding, and the copy. Needs Triton; without it, layers are written one by one.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Exchange", "can_exchange", "exchange"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 1024


class Exchange(NamedTuple):
    """What to put where: memory[:, columns] = originals + scaling * delta."""

    memory: Tensor
    """(O, I), contiguous."""
    columns: Tensor
    """(R,) int64."""
    originals: Tensor
    """(O, R) in the dtype of the memory, contiguous."""
    delta: Tensor | None
    """(O, R), contiguous; None: the originals as they are."""
    scaling: float


def can_exchange(memory: Tensor, delta: Tensor) -> bool:
    """Whether the kernel can be used for a weight, whatever is put in it."""
    return (
        memory.is_cuda
        and memory.dtype in _DTYPES
        and delta.dtype in _DTYPES
        and memory.is_contiguous()
        and delta.is_contiguous()
        and _kernel() is not None
    )


def exchange(exchanges: Sequence[Exchange]) -> None:
    """Put all columns by one launch for each pair of dtypes; all on one device."""
    kinds: dict[Any, list[Exchange]] = {}
    for each in exchanges:
        dtypes = each.memory.dtype, None if each.delta is None else each.delta.dtype
        kinds.setdefault((each.memory.device, *dtypes), []).append(each)
    for (device, dtype, delta_dtype), group in kinds.items():
        addresses, scalings = _table(device, tuple(map(_row, group)), delta_dtype is not None)
        size = max(each.originals.numel() for each in group)
        grid = (len(group), -(-size // _BLOCK))
        with torch.cuda.device(device) if device.type == "cuda" else torch.no_grad():
            _kernel()[grid](
                addresses,
                scalings,
                _triton_dtype(dtype),
                _triton_dtype(delta_dtype or dtype),
                adds=delta_dtype is not None,
                block=_BLOCK,
            )


def _row(each: Exchange) -> tuple[int | float, ...]:
    rows, rank = each.originals.shape
    source = each.originals if each.delta is None else each.delta
    pointers = (t.data_ptr() for t in (each.memory, each.columns, each.originals, source))
    return (*pointers, rows * rank, rank, each.memory.shape[1], each.scaling)


@functools.lru_cache(maxsize=16)
def _table(device: torch.device, rows: tuple[Any, ...], adds: bool) -> tuple[Tensor, Tensor]:
    """Return the (L, 7) addresses and sizes, and the (L,) scalings, on the device."""
    addresses = torch.tensor([row[:7] for row in rows], dtype=torch.int64)
    scalings = torch.tensor([row[7] for row in rows], dtype=torch.float32)
    if device.type != "cuda":  # Triton's interpreter
        return addresses, scalings
    return tuple(t.pin_memory().to(device, non_blocking=True) for t in (addresses, scalings))  # type: ignore[return-value]


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


@functools.cache
def _kernel() -> Any:
    """Return the kernel; None without Triton."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def put(
        table: Any,
        scalings: Any,
        dtype: tl.constexpr,
        delta_dtype: tl.constexpr,
        adds: tl.constexpr,
        block: tl.constexpr,
    ) -> None:
        weight = tl.program_id(0)
        row = table + weight * 7
        memory = tl.load(row).to(tl.pointer_type(dtype))
        columns = tl.load(row + 1).to(tl.pointer_type(tl.int64))
        originals = tl.load(row + 2).to(tl.pointer_type(dtype))
        delta = tl.load(row + 3).to(tl.pointer_type(delta_dtype))
        size, rank, width = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
        at = tl.program_id(1).to(tl.int64) * block + tl.arange(0, block)
        there = at < size
        values = tl.load(originals + at, mask=there)
        if adds:
            update = tl.load(delta + at, mask=there).to(tl.float32)
            # One rounding in float32 and one to the weight's dtype, as torch.add and to have.
            scaling = tl.load(scalings + weight)
            values = tl.fma(update, scaling, values.to(tl.float32)).to(dtype)
        column = tl.load(columns + at % rank, mask=there)
        tl.store(memory + (at // rank) * width + column, values, mask=there)

    return put
