"""Triton's kernel that decodes the blocks of a weight by one launch; its import needs Triton.

What it computes is what `formats` says, in the same order and roundings. A file of its own: before
Triton 3.4 a kernel sees nothing but the names of its file.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _half(start):  # type: ignore[no-untyped-def]
    """Return the float16 numbers at these bytes, as float32."""
    low, high = tl.load(start).to(tl.uint16), tl.load(start + 1).to(tl.uint16)
    return (low | high << 8).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def decode_blocks(  # type: ignore[no-untyped-def]
    rows,
    places,
    levels,
    scales,
    values,
    num_values,
    row_values,
    scale_rows,
    scale_columns,
    dtype: tl.constexpr,
    steps: tl.constexpr,
    block_values: tl.constexpr,
    block_bytes: tl.constexpr,
    low_bits: tl.constexpr,
    high_bits: tl.constexpr,
    size: tl.constexpr,
):
    """Write values[at] of program p: at = p * size to (p + 1) * size - 1.

    `places` holds 8 * byte + bit of each element, for each plane; `steps` names the function of
    `formats` that finds scale and minimum, or is "apart": `scales` has `scale_columns` for each
    `scale_rows` rows.
    """
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    at = tl.minimum(at, num_values - 1)  # the last program writes the last value many times
    element = (at % block_values).to(tl.int32)
    start = rows + at // block_values * block_bytes
    place = tl.load(places + element)
    code = (tl.load(start + place // 8).to(tl.int32) >> place % 8) & ((1 << low_bits) - 1)
    if high_bits > 0:
        place = tl.load(places + block_values + element)
        high = (tl.load(start + place // 8).to(tl.int32) >> place % 8) & ((1 << high_bits) - 1)
        code = code | high << low_bits
    level = tl.load(levels + code)
    if steps == "apart":
        row, column = at // row_values, at % row_values
        scale = row // scale_rows * scale_columns + column // (row_values // scale_columns)
        value = level * tl.load(scales + scale)
    elif steps == "symmetric":
        value = _half(start) * level
    elif steps == "with_minimum":
        value = _half(start) * level + _half(start + 2)
    elif steps == "of_32":
        part = element // 32
        first = start + 4 + part % 4
        low = tl.load(first).to(tl.int32)
        middle, high = tl.load(first + 4).to(tl.int32), tl.load(first + 8).to(tl.int32)
        is_first = part < 4
        scale = tl.where(is_first, low & 63, (high & 15) | low >> 6 << 4)
        minimum = tl.where(is_first, middle & 63, high >> 4 | middle >> 6 << 4)
        scale = _half(start) * scale.to(tl.float32)
        value = scale * level - _half(start + 2) * minimum.to(tl.float32)
    elif steps == "of_16":
        scale = (tl.load(start + 192 + element // 16).to(tl.int32) ^ 128) - 128
        value = _half(start + 208) * scale.to(tl.float32) * level
    elif steps == "of_power":
        power = tl.load(start).to(tl.int32)
        bits = tl.where(power < 2, 0x00200000 << tl.minimum(power, 1), (power - 1) << 23)
        value = bits.to(tl.float32, bitcast=True) * level
    elif steps == "of_float8":
        byte = tl.load(start + element // 16).to(tl.int32)
        exponent, mantissa = byte >> 3 & 15, byte & 7
        normal = ((exponent + 119) << 23 | mantissa << 20).to(tl.float32, bitcast=True)
        scale = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.0009765625, normal)
        value = tl.where((byte == 0) | (byte == 0x7F), 0.0, scale) * level
    else:
        tl.static_assert(steps == "of_signed_6_bits")
        part = element // 32
        low = tl.load(start + 4 + part // 2).to(tl.int32) >> 4 * (part % 2) & 15
        high = tl.load(start + 2 + part // 4).to(tl.int32) >> 2 * (part % 4) & 3
        value = _half(start) * ((low | high << 4) - 32).to(tl.float32) * level
    tl.store(values + at, value.to(dtype))
