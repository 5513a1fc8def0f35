"""Decodes blocks: on a GPU by one launch, elsewhere by transformers, or as `formats` says.

All give the same float32 numbers, bit for bit, and round them to a dtype once.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pacatune.grid.formats import GRIDS, Grid, Room
from pacatune.precision import dtype_name, kernel_works

# Values of a program of the kernel.
_SIZE = 1024
# Elements that torch decodes at once: what is made of them on the way stays in a CPU's caches, or
# takes little of another device's memory.
_CHUNK, _CHUNK_ELSEWHERE = 2**18, 2**24


def decode(
    grid: Grid, rows: Tensor, dtype: torch.dtype = torch.float32, scales: Tensor | None = None
) -> Tensor:
    """Return the (O, I) values of (O, bytes) rows, rounded once.

    Bit for bit those of `Grid.values`. `scales` are those of formats that have none in their
    blocks: (O / a, I / b) float32, each of a x b elements.
    """
    if rows.is_cuda and len(rows) and _works(rows.device, grid.name, dtype):
        return launch(grid, rows, dtype, scales)
    in_features = rows.shape[1] // grid.block_bytes * grid.block
    values = torch.empty(len(rows), in_features, dtype=dtype, device=rows.device)
    if rows.is_meta or not len(rows):
        return values
    each = 1 if scales is None else len(rows) // len(scales)
    chunk = _CHUNK if rows.is_cpu else _CHUNK_ELSEWHERE
    step = min(len(rows), max(1, chunk // in_features // each) * each)
    room = Room.of((step * in_features // grid.block, grid.block), rows.device)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        own = None if scales is None else scales[start // each : (start + len(part)) // each]
        values[start : start + step] = _floats(grid, part, own, room)
    return values


def _floats(grid: Grid, rows: Tensor, scales: Tensor | None, room: Room) -> Tensor:
    """Return the (O, I) float32 values of few rows."""
    if (by_transformers := _transformers_decoder(grid.name)) is not None:
        decoded = by_transformers(rows)
        return decoded.view(len(rows), -1)
    blocks = rows.reshape(-1, grid.block_bytes)
    levels, values = grid.levels_of_blocks(blocks, room), room.values[: len(blocks)]
    if scales is not None:
        shape = len(scales), len(rows) // len(scales), scales.shape[1], -1
        torch.mul(levels.view(shape), scales[:, None, :, None], out=values.view(shape))
        return values.view(len(rows), -1)
    assert grid.steps is not None, "its scales are not in its blocks"
    parts = torch.arange(0, grid.block, grid.part, device=rows.device)
    scale, minimum = grid.steps(blocks[:, None].expand(-1, len(parts), -1), parts)
    in_parts = values.view(len(blocks), -1, grid.part)
    torch.mul(levels.view_as(in_parts), scale[..., None], out=in_parts)
    in_parts.add_(minimum[..., None])
    return values.view(len(rows), -1)


def _works(*kind: Any) -> bool:
    otherwise = "weights are decoded by several operations, to the same values, which takes longer"
    return kernel_works("decodes the blocks of weights", otherwise, _try, *kind)


def _try(device: torch.device, name: str, dtype: torch.dtype) -> None:
    """Decode a few rows of all kinds of bytes both ways."""
    grid, num_bytes = GRIDS[name], 8 * GRIDS[name].block_bytes
    drawn: Any = {"generator": torch.Generator("cpu").manual_seed(0)}
    rows = torch.randint(256, (4, num_bytes), dtype=torch.uint8, device="cpu", **drawn)
    scales = torch.rand(2, 4, device="cpu", **drawn) if grid.steps is None else None
    expected = decode(grid, rows, dtype, scales)
    on_device = None if scales is None else scales.to(device)
    found = launch(grid, rows.to(device), dtype, on_device).cpu()
    if not torch.equal(found.nan_to_num(), expected.nan_to_num()):
        raise RuntimeError(f"it decodes {grid.name} to other values than torch")


def launch(grid: Grid, rows: Tensor, dtype: torch.dtype, scales: Tensor | None) -> Tensor:
    """Return the (O, I) values of (O, bytes) rows by Triton's kernel."""
    import triton.language as tl

    from pacatune.grid.kernel import decode_blocks

    places, levels = _tables(grid.name, rows.device)
    row_values = rows.shape[1] // grid.block_bytes * grid.block
    values = torch.empty(len(rows), row_values, dtype=dtype, device=rows.device)
    apart = levels if scales is None else scales.contiguous()
    scale_rows, scale_columns = 1, 1
    if scales is not None:
        scale_rows, scale_columns = len(rows) // len(scales), scales.shape[1]
    with torch.cuda.device(rows.device) if rows.is_cuda else nullcontext():
        decode_blocks[(-(-values.numel() // _SIZE),)](
            *(rows.contiguous(), places, levels, apart, values),
            *(values.numel(), row_values, scale_rows, scale_columns),
            dtype=getattr(tl, dtype_name(dtype)),
            **kernel_options(grid),
            enable_fp_fusion=False,  # each operation rounds
        )
    return values


def kernel_options(grid: Grid) -> dict[str, Any]:
    """Return what of a format the kernel is compiled for."""
    low, *high = [plane.width for plane in grid.planes]
    return {
        "steps": "apart" if grid.steps is None else grid.steps.__name__.removeprefix("_"),
        "block_values": grid.block,
        "block_bytes": grid.block_bytes,
        "low_bits": low,
        "high_bits": sum(high),
        "size": _SIZE,
    }


@functools.cache
def _tables(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return 8 byte + bit of each element, (planes, block) int32, and the level of each code."""
    grid = GRIDS[name]
    places = [[8 * byte + bit for byte, bit in plane.places] for plane in grid.planes]
    codes = torch.arange(grid.num_codes, device=device) ^ grid.flipped  # as they are stored
    levels = grid.values(codes, *torch.tensor([1.0, 0.0], device=device))
    return torch.tensor(places, dtype=torch.int32, device=device), levels


@functools.cache
def _transformers_decoder(name: str) -> Callable[[Tensor], Tensor] | None:
    """Return transformers' decoder of blocks, which is faster; None where it has none."""
    try:
        from transformers.integrations.gguf.dequant import GGML_NAME, dequantize
    except ImportError:
        return None
    for number, known in GGML_NAME.items():
        if known == name:
            return lambda rows: dequantize(rows.reshape(-1), number, torch.float32)
    return None
