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
    mixes: tl.constexpr,
    takes: tl.constexpr,
    block: tl.constexpr,
):
    """Put the columns of weight p // num_blocks, or take them: block p % num_blocks of it."""
    program = tl.program_id(0)
    weight = program // num_blocks
    row = table + weight * 9
    memory = tl.load(row).to(tl.pointer_type(dtype))
    columns = tl.load(row + 1).to(tl.pointer_type(tl.int64))
    originals = tl.load(row + 2).to(tl.pointer_type(dtype))
    delta = tl.load(row + 3).to(tl.pointer_type(delta_dtype))
    mix = tl.load(row + 4).to(tl.pointer_type(delta_dtype))
    size, count, width, rank = (
        tl.load(row + 5),
        tl.load(row + 6),
        tl.load(row + 7),
        tl.load(row + 8),
    )
    at = (program % num_blocks).to(tl.int64) * block + tl.arange(0, block)
    there = at < size
    place = memory + at // count * width + tl.load(columns + at % count, mask=there)
    if takes:
        tl.store(originals + at, tl.load(place, mask=there), mask=there)
        return
    values = tl.load(originals + at, mask=there)
    if adds:
        if mixes:  # delta mix, whose sum is rounded once to float32, as `mixed` does
            total = tl.zeros([block], tl.float64)
            for k in range(rank):
                left = tl.load(delta + at // count * rank + k, mask=there).to(tl.float64)
                right = tl.load(mix + k * count + at % count, mask=there).to(tl.float64)
                total = tl.fma(left, right, total)
            update = total.to(tl.float32)
        else:
            update = tl.load(delta + at, mask=there).to(tl.float32)
        # One rounding in float32 and one to the weight's dtype, as torch.add and to have.
        scaling = tl.load(scalings + weight)
        values = tl.fma(update, scaling, values.to(tl.float32)).to(dtype)
    tl.store(place, values, mask=there)
