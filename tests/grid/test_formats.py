"""Codes and values of quantised weights, held against the package gguf."""

import pytest
import torch

from pacatune.grid.checkpoint import _row_order
from pacatune.grid.formats import GRIDS

quants = pytest.importorskip("gguf.quants")
from gguf import GGMLQuantizationType  # noqa: E402 (after its absence is known)

OUT, NUM_BLOCKS = 5, 3


BLOCKS = {name: grid for name, grid in GRIDS.items() if grid.steps is not None}


def rows_of(grid, seed=0):
    """Rows of random bytes, whose scales are numbers."""
    generator = torch.Generator().manual_seed(seed)
    shape = (OUT, NUM_BLOCKS, grid.block_bytes)
    blocks = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    halves = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    halves |= {"MXFP4": (), "NVFP4": ()}  # which have no numbers that are not finite
    for start in halves.get(grid.name, (0,)):
        number = torch.randn(OUT, NUM_BLOCKS, 1, generator=generator).half()
        blocks[..., start : start + 2] = number.view(torch.uint8).view(OUT, NUM_BLOCKS, 2)
    return blocks.flatten(1)


def values_of(grid, rows, columns):
    return grid.values(grid.codes(rows, columns), *grid.scales(rows, columns))


def reference(grid, rows):
    kind = GGMLQuantizationType[grid.name]
    return torch.from_numpy(quants.dequantize(rows.numpy(), kind))


@pytest.mark.parametrize("grid", BLOCKS.values(), ids=BLOCKS)
def test_values_are_those_of_the_package(grid):
    rows = rows_of(grid)
    every = torch.arange(NUM_BLOCKS * grid.block)
    assert rows.shape[1] == grid.row_bytes(len(every))
    expected = reference(grid, rows)
    assert expected.isfinite().all()
    assert torch.equal(values_of(grid, rows, every), expected)
    assert int(grid.codes(rows, every).max()) < grid.num_codes


@pytest.mark.parametrize("grid", BLOCKS.values(), ids=BLOCKS)
def test_codes_are_written_and_nothing_else(grid):
    rows, every = rows_of(grid), torch.arange(NUM_BLOCKS * grid.block)
    before, kept = reference(grid, rows), rows.clone()
    # Neighbours, which may share a byte, and others.
    columns = torch.tensor([0, 1, 15, 16, 17, grid.block - 1, grid.block, 2 * grid.block + 5])
    generator = torch.Generator().manual_seed(1)
    shape = (OUT, len(columns))
    codes = torch.randint(grid.num_codes, shape, generator=generator, dtype=torch.uint8)
    grid.put_codes_(rows, columns, codes)
    assert torch.equal(grid.codes(rows, columns), codes)
    others = torch.tensor([column for column in every.tolist() if column not in columns.tolist()])
    assert torch.equal(reference(grid, rows)[:, others], before[:, others])
    grid.put_codes_(rows, columns, grid.codes(kept, columns))
    assert torch.equal(rows, kept)


@pytest.mark.parametrize("grid", BLOCKS.values(), ids=BLOCKS)
def test_a_change_moves_codes_to_the_nearest(grid):
    rows, columns = rows_of(grid), torch.tensor([3, 20, 21])
    scale, minimum = grid.scales(rows, columns)
    values, before = values_of(grid, rows, columns), grid.codes(rows, columns)
    still = grid.moved(before, scale, torch.zeros_like(scale))
    assert torch.equal(still.after, before)
    assert still.num_clipped == 0
    small = grid.moved(before, scale, 0.49 * scale)
    assert torch.equal(small.after, before)
    width = 9 if grid.num_codes < 256 else 300
    change = scale * torch.linspace(-width, width, scale.numel()).view_as(scale)
    moved = grid.moved(before, scale, change)
    grid.put_codes_(rows, columns, moved.after)
    error = (values_of(grid, rows, columns) - values - change).abs()
    every = scale[..., None] * grid._levels_on(scale.device) + minimum[..., None]
    least = (every - (values + change)[..., None]).abs().amin(-1)
    assert (error <= least + 1e-5 * every.abs().amax(-1)).all()
    assert (moved.after != before).any()
    if not grid.levels:
        places = before.float() + (change / scale).nan_to_num(0, 0, 0)
        is_beyond = (places < -0.5) | (places > grid.num_codes - 0.5)
        assert moved.num_clipped == int(is_beyond.sum()) > 0


def test_a_block_whose_scale_is_zero_keeps_its_codes():
    grid = GRIDS["Q4_0"]
    rows, columns = rows_of(grid), torch.tensor([2])
    rows[:, :2] = 0
    scale, _ = grid.scales(rows, columns)
    before = grid.codes(rows, columns)
    assert torch.equal(grid.moved(before, scale, torch.ones(OUT, 1)).after, before)


def test_what_is_no_number_keeps_its_code():
    """Of FP8 a code may be NaN, and any format's scale."""
    grid, codes = GRIDS["F8_E4M3"], torch.tensor([[0x7F, 0xFF, 0x10, 0x10]], dtype=torch.uint8)
    scale = torch.tensor([[1.0, 1.0, float("nan"), 1.0]])
    moved = grid.moved(codes, scale, torch.full((1, 4), 5.0))
    assert (codes == moved.after).tolist() == [[True, True, True, False]]
    assert moved.num_clipped == 0


def test_rows_that_the_trained_columns_do_not_tell_apart_are_refused():
    """The halves of heads may lie in another order, and an update would go to other rows."""
    columns, rows = torch.arange(16.0).view(8, 2), torch.arange(8)
    assert torch.equal(_row_order(columns, columns, (2,), "q"), rows)
    halves = rows.view(2, 2, -1).transpose(1, 2).flatten()
    assert torch.equal(_row_order(columns[halves], columns, (2,), "q"), halves)
    equal = torch.zeros(8, 2)
    assert torch.equal(_row_order(equal, equal, (4,), "q"), rows)  # of heads of two rows
    with pytest.raises(ValueError, match="'q' has equal rows in the columns that are trained"):
        _row_order(equal, equal, (2,), "q")
