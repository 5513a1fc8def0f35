"""Decodes blocks: on a GPU by one launch, elsewhere by transformers, or as `formats` says.

All give the same float32 numbers, bit for bit, and round them to a dtype once.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pacatune.grid.formats import GRIDS, Grid
from pacatune.precision import dtype_name, kernel_works

# Values of a program of the kernel.
_SIZE = 1024


def decode(grid: Grid, rows: Tensor, scales: Tensor | None = None) -> Tensor:
    """Return the (O, I) float32 values of (O, bytes) rows, bit for bit those of `Grid.values`."""
    if scales is not None:
        return _scaled(grid, rows, scales)
    blocks = rows.reshape(-1, grid.block_bytes)
    if (by_transformers := _transformers_decoder(grid.name)) is not None:
        values = by_transformers(blocks)
        return values.view(len(rows), -1)
    assert grid.steps is not None, "its scales are not in its blocks"
    levels = grid.levels_of(grid.codes_of_blocks(blocks))
    # Parts of 16 elements have one scale in all formats.
    parts = torch.arange(0, grid.block, 16, device=rows.device)
    scale, minimum = grid.steps(blocks[:, None].expand(-1, len(parts), -1), parts)
    values = levels.view(len(blocks), -1, 16).mul_(scale[..., None]).add_(minimum[..., None])
    return values.view(len(rows), -1)


def decoded_by_kernel(
    grid: Grid, rows: Tensor, dtype: torch.dtype, scales: Tensor | None
) -> Tensor | None:
    """Return what `decoded` does, by one launch; None where there is no GPU or no kernel."""
    if not rows.is_cuda or not len(rows) or not _works(rows.device, grid.name, dtype):
        return None
    return launch(grid, rows, dtype, scales)


def _works(*kind: Any) -> bool:
    otherwise = "weights are decoded by several operations, to the same values, which takes longer"
    return kernel_works("decodes the blocks of weights", otherwise, _try, *kind)


def _try(device: torch.device, name: str, dtype: torch.dtype) -> None:
    """Decode a few rows of all kinds of bytes both ways."""
    grid, generator = GRIDS[name], torch.Generator().manual_seed(0)
    shape, num_bytes = (4, 8 * grid.block), 8 * grid.block_bytes
    rows = torch.randint(256, (4, num_bytes), generator=generator, dtype=torch.uint8)
    scales = torch.rand(2, 4, generator=generator) if grid.steps is None else None
    expected = decode(grid, rows, scales).to(dtype).view(shape)
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
    codes = torch.arange(grid.num_codes, dtype=torch.uint8, device=device)
    levels = grid.levels_of(codes ^ grid.flipped)
    return torch.tensor(places, dtype=torch.int32, device=device), levels


def _scaled(grid: Grid, rows: Tensor, scales: Tensor) -> Tensor:
    """Return the values of codes whose (O / a, I / b) scales are a tensor of their own."""
    if grid.name == "F8_E4M3":
        levels = rows.view(torch.float8_e4m3fn).float()
    else:
        blocks = rows.reshape(-1, grid.block_bytes)
        levels = grid.levels_of(grid.codes_of_blocks(blocks)).view(len(rows), -1)
    parts = levels.unflatten(0, (len(scales), -1)).unflatten(2, (scales.shape[1], -1))
    values: Tensor = parts * scales[:, None, :, None]
    return values.reshape(levels.shape)


@functools.cache
def _transformers_decoder(name: str) -> Callable[[Tensor], Tensor] | None:
    """Return transformers' decoder of blocks, which is faster; None where it has none."""
    try:
        from transformers.integrations.gguf.dequant import GGML_NAME, dequantize
    except ImportError:
        return None
    for number, known in GGML_NAME.items():
        if known == name:
            return lambda blocks: dequantize(blocks.reshape(-1), number, torch.float32)
    return None
