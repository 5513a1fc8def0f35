"""Puts columns into weights, or back: the only code that writes there while a model trains.

On a GPU all weights are one launch, by a kernel that reads their addresses: a launch takes longer
than the columns of a layer, and each layer would need three (the sum, its rounding, the copy). That
needs Triton, a C compiler and a GPU that both know: it is tried first. Where it fails, and on CPUs,
they are written one by one.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pacatune.ops.columns import Update, put_columns_
from pacatune.precision import kernel_works

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 1024


class Kept(NamedTuple):
    """What a write overwrites, and where."""

    memory: Tensor
    """(O, I) alias of the weight: writes through it pass autograd's version check."""
    columns: Tensor
    """(R,) int64; a copy, since the adapter's own may be reloaded."""
    originals: Tensor
    """(O, R) in the weight's dtype."""


class Put(NamedTuple):
    """memory[:, columns] = originals + scaling * delta, or the originals as they are."""

    kept: Kept
    update: Update | None


def room_for(memory: Tensor, columns: Tensor) -> Kept:
    """Return where to `keep` what a write to memory[:, columns] will overwrite."""
    return Kept(memory, columns, memory.new_empty(len(memory), len(columns)))


def is_aside(memory: Tensor) -> bool:
    """Whether work on a tensor's GPU goes to another stream than the default one now."""
    return memory.is_cuda and torch._C._cuda_getCurrentRawStream(memory.get_device()) != 0


@contextmanager
def in_turn(*memories: Tensor) -> Iterator[None]:
    """Run after what other streams have queued for weights, and before what they queue next.

    Whoever is not on the default stream of a GPU waits for it, and lets it wait: that brings all
    into one order. What is recorded for a CUDA graph waits for nobody.
    """
    on_each = {memory.device: memory for memory in memories}
    devices = {device for device, memory in on_each.items() if is_aside(memory)}
    if devices and torch.cuda.is_current_stream_capturing():
        devices.clear()
    for device in devices:
        torch.cuda.current_stream(device).wait_stream(torch.cuda.default_stream(device))
    try:
        yield
    finally:  # what was queued before an error is there as well
        for device in devices:
            torch.cuda.default_stream(device).wait_stream(torch.cuda.current_stream(device))


def keep(rooms: Sequence[Kept]) -> None:
    """Copy aside what writes will overwrite."""
    with in_turn(*[kept.memory for kept in rooms]):
        if len(rooms) > 1 and all(can_exchange(kept.memory, kept.originals) for kept in rooms):
            exchange([Put(kept, None) for kept in rooms], takes=True)
            return
        for kept in rooms:
            torch.index_select(kept.memory, 1, kept.columns, out=kept.originals)


def put(puts: Sequence[Put]) -> None:
    """Write the columns of all, which are known to allow it."""
    with in_turn(*[kept.memory for kept, _ in puts]):
        if len(puts) > 1 and _have_kernel(puts):
            exchange(puts)
            return
        for kept, update in puts:
            with torch.no_grad():
                values = kept.originals if update is None else update.adapted(kept.originals)
            put_columns_(kept.memory, kept.columns, values)


def _have_kernel(puts: Sequence[Put]) -> bool:
    for kept, update in puts:
        values, mix = (kept.originals, None) if update is None else (update.delta, update.mix)
        if not can_exchange(kept.memory, values, mix):
            return False
    return True


def can_exchange(memory: Tensor, values: Tensor, mix: Tensor | None = None) -> bool:
    """Whether the kernel can put values of such a dtype and form into such a weight."""
    if mix is not None and not (mix.is_contiguous() and mix.dtype == values.dtype):
        return False
    return (
        is_on_gpu(memory)
        and memory.dtype in _DTYPES
        and values.dtype in _DTYPES
        and memory.is_contiguous()
        and values.is_contiguous()
        and _works(memory.device, memory.dtype, values.dtype, mix is not None)
    )


def is_on_gpu(memory: Tensor) -> bool:
    """Whether a weight is where a launch takes longer than to write columns."""
    return memory.is_cuda


def _works(*kind: Any) -> bool:
    """Whether the kernel does on such a device, with such dtypes, what torch does; tried once."""
    otherwise = "they are written layer by layer, with the same results"
    return kernel_works("writes the columns of all layers at once", otherwise, _try, *kind)


def _try(
    device: torch.device, dtype: torch.dtype, delta_dtype: torch.dtype, mixes: bool = False
) -> None:
    """Take, put and restore the columns of a small weight, and compare with torch's way."""
    weight = torch.linspace(1, 2, 24, device=device).view(4, 6).to(dtype)
    delta = torch.linspace(-1, 1, 8, device=device).view(4, 2).to(delta_dtype)
    columns = torch.tensor([1, 4], device=device)
    mix = torch.linspace(-1, 2, 4, device=device).view(2, 2).to(delta_dtype) if mixes else None
    update = Update(delta, columns, 1.7, mix)
    ours, theirs = (Put(room_for(weight.clone(), columns), update) for _ in range(2))
    exchange([ours], takes=True)
    exchange([ours])
    keep([theirs.kept])  # one alone goes torch's way
    put([theirs])
    is_right = torch.equal(ours.kept.memory, theirs.kept.memory)
    exchange([ours._replace(update=None)])
    if not (is_right and torch.equal(ours.kept.memory, weight)):
        raise RuntimeError("it writes other values than torch")


def exchange(puts: Sequence[Put], *, takes: bool = False) -> None:
    """Put all columns, or take the originals, by one launch for each device, dtypes and form."""
    kinds: dict[Any, list[Put]] = {}
    for one in puts:
        memory, update = one.kept.memory, one.update
        form = (None, False) if update is None else (update.delta.dtype, update.mix is not None)
        kinds.setdefault((memory.device, memory.dtype, *form), []).append(one)
    for (device, dtype, delta_dtype, mixes), group in kinds.items():
        addresses, scalings = _table(device, _rows(group), delta_dtype is not None)
        # One axis, since the others end at 65,535 blocks.
        num_blocks = -(-max([kept.originals.numel() for kept, _ in group]) // _BLOCK)
        with torch.cuda.device(device) if device.type == "cuda" else torch.no_grad():
            _kernel()[(len(group) * num_blocks,)](
                addresses,
                scalings,
                num_blocks,
                _triton_dtype(dtype),
                _triton_dtype(delta_dtype or dtype),
                adds=delta_dtype is not None,
                mixes=mixes,
                takes=takes,
                block=_BLOCK,
            )


def _rows(puts: Sequence[Put]) -> tuple[tuple[int | float, ...], ...]:
    """Return what the kernel is told of each weight; a function for each would cost as much."""
    rows = []
    for (memory, columns, originals), update in puts:
        values, mix, scaling = originals, None, 0.0
        if update is not None:
            values, _, scaling, mix = update
        pointers = memory.data_ptr(), columns.data_ptr(), originals.data_ptr(), values.data_ptr()
        sizes = originals.numel(), originals.shape[1], memory.shape[1], values.shape[1]
        rows.append((*pointers, 0 if mix is None else mix.data_ptr(), *sizes, scaling))
    return tuple(rows)


@functools.lru_cache(maxsize=512)  # FSDP2's buffers come and go, at the same places as a rule
def _table(device: torch.device, rows: tuple[Any, ...], adds: bool) -> tuple[Tensor, Tensor]:
    """Return the (L, 9) addresses and sizes, and the (L,) scalings, on the device."""
    addresses = torch.tensor([row[:9] for row in rows], dtype=torch.int64, device="cpu")
    scalings = torch.tensor([row[9] for row in rows], dtype=torch.float32, device="cpu")
    if device.type != "cuda":  # Triton's interpreter
        return addresses, scalings
    return tuple(t.pin_memory().to(device, non_blocking=True) for t in (addresses, scalings))  # type: ignore[return-value]


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


def _kernel() -> Any:
    from pacatune.residency.kernel import exchange_columns

    return exchange_columns
