"""Triton's kernel that puts the columns of all weights by one launch; its import needs Triton.

A file of its own: before Triton 3.4, which torch 2.8 brought, a kernel sees nothing but the names
of its file.
"""

import triton
import triton.language as tl


# Triton reads annotations, and takes no names in them but its own.
@triton.jit(do_not_specialize=["num_blocks"])  # type: ignore[untyped-decorator, unused-ignore]
def exchange_columns(  # type: ignore[no-untyped-def]
    table,
    scalings,
    num_blocks,
    dtype: tl.constexpr,
    delta_dtype: tl.constexpr,
    adds: tl.constexpr,
    takes: tl.constexpr,
    block: tl.constexpr,
):
    """Put the columns of weight p // num_blocks, or take them: block p % num_blocks of it."""
    program = tl.program_id(0)
    weight = program // num_blocks
    row = table + weight * 7
    memory = tl.load(row).to(tl.pointer_type(dtype))
    columns = tl.load(row + 1).to(tl.pointer_type(tl.int64))
    originals = tl.load(row + 2).to(tl.pointer_type(dtype))
    delta = tl.load(row + 3).to(tl.pointer_type(delta_dtype))
    size, rank, width = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    at = (program % num_blocks).to(tl.int64) * block + tl.arange(0, block)
    there = at < size
    place = memory + at // rank * width + tl.load(columns + at % rank, mask=there)
    if takes:
        tl.store(originals + at, tl.load(place, mask=there), mask=there)
        return
    values = tl.load(originals + at, mask=there)
    if adds:
        update = tl.load(delta + at, mask=there).to(tl.float32)
        # One rounding in float32 and one to the weight's dtype, as torch.add and to have.
        scaling = tl.load(scalings + weight)
        values = tl.fma(update, scaling, values.to(tl.float32)).to(dtype)
    tl.store(place, values, mask=there)
