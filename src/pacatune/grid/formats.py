"""What the elements of a quantised weight can be: codes of blocks, which scales make values.

A weight (O, I) lies in rows of blocks of elements. A `Grid` says where the bits of each element's
code lie in its block, and how a code becomes a value, in float32 and in this order:

    value = scale * level[code] + minimum

where levels are code - zero in most formats, and a table in those of floating-point codes.
Scales and minima are the file's; what is trained changes codes alone. The layouts are those of
ggml's `block_q4_0` and the others (ggml-common.h), whose blocks hold their scales; `gguf.quants` is
the reference of the tests. In safetensors scales are tensors of their own.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Steps = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Returns scale and minimum, (O, R) float32, of (O, R, bytes) blocks and the (R,) elements."""


@dataclass(frozen=True)
class Plane:
    """Some bits of every code: for each element of a block its byte and its lowest bit there."""

    width: int
    """How many bits."""
    places: tuple[tuple[int, int], ...]
    """(byte, bit) of each element."""

    def of_blocks(self, blocks: Tensor, low: int, out: Tensor) -> None:
        """Write them, at bit `low`, for all elements of (N, bytes) blocks: (N, block) uint8."""
        runs, mask, start = self._runs, (1 << self.width) - 1 << low, 0
        if 1 < len(runs) == len(self.places):  # elements lie side by side in a byte
            table, first = _spread(self.width, low, blocks.device), runs[0][0]
            used = blocks[:, first : first + len(runs) * self.width // 8]
            elements = out.view(table.dtype).flatten()
            torch.index_select(table, 0, used.flatten().int(), out=elements)
            return
        for byte, size, bit in runs:
            part, here = blocks[:, byte : byte + size], out[:, start : start + size]
            start += size
            if bit > low:
                torch.bitwise_right_shift(part, bit - low, out=here)
            else:
                torch.bitwise_left_shift(part, low - bit, out=here)
            if low or bit + self.width < 8:  # else other bits were shifted out
                here.bitwise_and_(mask)

    @functools.cached_property
    def _runs(self) -> list[tuple[int, int, int]]:
        """First byte, number, and bit of elements that lie in bytes one after the other."""
        runs: list[tuple[int, int, int]] = []
        for byte, bit in self.places:
            if runs and (byte, bit) == (sum(runs[-1][:2]), runs[-1][2]):
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, bit)
            else:
                runs.append((byte, 1, bit))
        return runs


@dataclass(frozen=True)
class Grid:
    """A format: what an element can be, and where it lies."""

    name: str
    """As the file calls it, such as `Q4_1`."""
    block_bytes: int
    planes: tuple[Plane, ...]
    """The bits of a code, lowest first."""
    steps: Steps | None = None
    """None: scales are not in the blocks."""
    zero: int = 0
    """Code of level 0, where levels have one distance."""
    levels: tuple[float, ...] = ()
    """Level of each code, where they have not; NaN for codes that are no number."""
    flipped: int = 0
    """Bits of a code that are stored turned round, as the sign of a byte."""
    part: int = 32
    """Elements that share a scale."""

    @property
    def block(self) -> int:
        """Elements of a block."""
        return len(self.planes[0].places)

    @property
    def num_codes(self) -> int:
        """Codes are 0 to this minus 1."""
        return 1 << sum(plane.width for plane in self.planes)

    def row_bytes(self, in_features: int) -> int:
        """Return the bytes of a row."""
        return in_features // self.block * self.block_bytes

    def byte_places(self, indices: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return for each plane the byte in the row, and the bit in it, of (R,) columns."""
        starts, elements = indices // self.block * self.block_bytes, indices % self.block
        places = []
        for plane in self.planes:
            byte, bit = torch.tensor(plane.places, device=indices.device)[elements].unbind(1)
            places.append((starts + byte, bit))
        return places

    def codes(self, rows: Tensor, indices: Tensor) -> Tensor:
        """Return the (O, R) uint8 codes of columns of (O, bytes) rows."""
        codes, low = torch.zeros(len(rows), len(indices), dtype=torch.uint8, device=rows.device), 0
        for plane, (byte, bit) in zip(self.planes, self.byte_places(indices), strict=True):
            part = rows[:, byte] >> bit.to(torch.uint8) & (1 << plane.width) - 1
            codes |= part << low
            low += plane.width
        return codes ^ self.flipped

    def levels_of_blocks(self, blocks: Tensor, room: "Room") -> Tensor:
        """Return the levels of all elements of (N, bytes) blocks: (N, block), int8 or float32."""
        codes, low = room.codes[: len(blocks)], 0
        for plane in self.planes:
            here = room.more[: len(blocks)] if low else codes
            plane.of_blocks(blocks, low, here)
            if low:
                codes.bitwise_or_(here)
            low += plane.width
        if self.levels:
            flat = room.values[: len(blocks)].flatten()
            torch.index_select(self._levels_on(codes.device), 0, codes.flatten().int(), out=flat)
            return flat.view_as(codes)
        # The codes of 8 bits are stored as levels, by their sign.
        return codes.view(torch.int8) if self.flipped else codes.view(torch.int8).sub_(self.zero)

    def put_codes_(self, rows: Tensor, indices: Tensor, codes: Tensor) -> None:
        """Write the codes of columns into (O, bytes) rows, in place; no other bit changes."""
        low, codes = 0, codes ^ self.flipped
        for plane, (byte, bit) in zip(self.planes, self.byte_places(indices), strict=True):
            mask = (1 << plane.width) - 1
            part = codes >> low & mask
            # One by one: two columns may lie in one byte.
            for place, shift, column in zip(byte.tolist(), bit.tolist(), part.T, strict=True):
                kept = rows[:, place] & ~(mask << shift) & 0xFF
                rows[:, place] = kept | column << shift
            low += plane.width

    def scales(self, rows: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and minimum, (O, R) float32, that columns of (O, bytes) rows hold."""
        assert self.steps is not None
        blocks = rows.unflatten(1, (-1, self.block_bytes))[:, indices // self.block]
        return self.steps(blocks, indices % self.block)

    def values(self, codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
        """Return the (O, R) float32 values of codes."""
        return scale * self._levels_on(codes.device)[codes.long()] + minimum

    def _levels_on(self, device: torch.device) -> Tensor:
        levels = self.levels or range(-self.zero, self.num_codes - self.zero)
        return torch.tensor(levels, dtype=torch.float32, device=device)

    def moved(self, before: Tensor, scale: Tensor, change: Tensor) -> "Moved":
        """Return the codes nearest to the values of (O, R) codes plus an (O, R) change.

        An element whose change is less than half a step keeps its code, and so does one that is no
        number (NaN). Where the nearest code would lie beyond the block's range it is clipped.
        """
        steps = torch.where(scale == 0, 0.0, change.float() / torch.where(scale == 0, 1.0, scale))
        of_codes = self._levels_on(before.device)
        levels, places = of_codes.sort(stable=True)  # NaN at the end
        levels = levels[~levels.isnan()]
        start = of_codes[before.long()]
        wanted = start + steps
        right = torch.searchsorted(levels, wanted.contiguous()).clamp(1, len(levels) - 1)
        is_left = wanted - levels[right - 1] <= levels[right] - wanted
        nearest = torch.where(is_left, right - 1, right)
        after = places[nearest].to(torch.uint8)
        # Of two codes as near, and of the two zeros of floating point, the old one stays.
        distance = (wanted - levels[nearest]).abs()
        stays = (wanted - start).abs() <= distance
        stays |= wanted.isnan()
        low, high = levels[0] * 1.5 - levels[1] / 2, levels[-1] * 1.5 - levels[-2] / 2
        num_clipped = ((wanted < low) | (wanted > high)).sum()
        return Moved(torch.where(stays, before, after), num_clipped)


class Room(NamedTuple):
    """Where elements of blocks are on the way to values, each (N, block)."""

    codes: Tensor
    """uint8."""
    more: Tensor
    """uint8: of one plane."""
    values: Tensor
    """float32."""

    @classmethod
    def of(cls, shape: tuple[int, int], device: torch.device) -> "Room":
        """Return room for so many elements."""
        codes, more = (torch.empty(shape, dtype=torch.uint8, device=device) for _ in range(2))
        return cls(codes, more, torch.empty(shape, dtype=torch.float32, device=device))


class Moved(NamedTuple):
    """Columns after a change."""

    after: Tensor
    """(O, R), uint8 where they are codes."""
    num_clipped: Tensor
    """How many elements would lie beyond their block's range, ()."""


@functools.cache
def _spread(width: int, low: int, device: torch.device) -> Tensor:
    """Return the elements in each byte as one integer, each at bit `low` of a byte of its own."""
    bits = torch.arange(0, 8, width, dtype=torch.uint8, device=device)
    elements = torch.arange(256, dtype=torch.uint8, device=device)[:, None] >> bits
    dtype = {2: torch.int16, 4: torch.int32, 8: torch.int64}[len(bits)]
    return ((elements & (1 << width) - 1) << low).view(dtype).flatten()


def _float16(blocks: Tensor, start: int) -> Tensor:
    """Return the number at a byte of each block, (O, R)."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16)[..., 0].float()


def _symmetric(blocks: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
    scale = _float16(blocks, 0)
    return scale, torch.zeros_like(scale)


def _with_minimum(blocks: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
    return _float16(blocks, 0), _float16(blocks, 2)


def _of_32(blocks: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
    """Return the steps of Q4_K and Q5_K: 6-bit scales and minima of eight parts of 32 elements."""
    packed = blocks[..., 4:16]
    low, middle, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat([low & 63, high & 15 | low >> 6 << 4], dim=-1)
    minima = torch.cat([middle & 63, high >> 4 | middle >> 6 << 4], dim=-1)
    part = (elements // 32).expand(blocks.shape[:-1])[..., None]
    scale, minimum = (numbers.gather(-1, part)[..., 0].float() for numbers in (scales, minima))
    return _float16(blocks, 0) * scale, -(_float16(blocks, 2) * minimum)


def _of_16(blocks: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
    """Return the steps of Q6_K: signed scales of sixteen parts of 16 elements."""
    scales = blocks[..., 192:208].contiguous().view(torch.int8)
    part = (elements // 16).expand(blocks.shape[:-1])[..., None]
    scale = _float16(blocks, 208) * scales.gather(-1, part)[..., 0].float()
    return scale, torch.zeros_like(scale)


def _of_power(blocks: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
    """Return the steps of MXFP4: half of a power of two, by its exponent."""
    power = blocks[..., 0].int()
    bits = torch.where(power < 2, 0x00200000 << power.clamp(max=1), power - 1 << 23)
    scale = bits.view(torch.float32)
    return scale, torch.zeros_like(scale)


def _of_float8(blocks: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
    """Return the steps of NVFP4: half of an unsigned E4M3 for each of four parts of 16 elements."""
    part = (elements // 16).expand(blocks.shape[:-1])[..., None]
    byte = blocks[..., :4].gather(-1, part)[..., 0]
    exponent, mantissa = (byte >> 3 & 15).float(), (byte & 7).float()
    normal = (1 + mantissa / 8) * 2 ** (exponent - 7)
    scale = torch.where(exponent == 0, mantissa * 2**-9, normal) / 2
    scale = torch.where((byte == 0) | (byte == 0x7F), 0.0, scale)
    return scale, torch.zeros_like(scale)


def _of_signed_6_bits(blocks: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
    """Return the steps of IQ4_XS: 6-bit scales of eight parts of 32 elements."""
    part = (elements // 32).expand(blocks.shape[:-1])[..., None]
    low = blocks[..., 4:8].gather(-1, part // 2) >> 4 * (part % 2) & 15
    high = blocks[..., 2:4].gather(-1, part // 4) >> 2 * (part % 4) & 3
    scale = _float16(blocks, 0) * ((low | high << 4)[..., 0].float() - 32)
    return scale, torch.zeros_like(scale)


def _halves(start: int, size: int = 32) -> Plane:
    """Return low and high half bytes: of `size` elements in `size` / 2 bytes."""
    half = size // 2
    return Plane(4, tuple((start + e % half, 4 * (e // half)) for e in range(size)))


def _parts(start: int, size: int, number: int) -> Plane:
    """Return `number` of these, one after the other."""
    places = [_halves(start + part * size // 2, size).places for part in range(number)]
    return Plane(4, tuple(place for part in places for place in part))


def _bits(start: int) -> Plane:
    """Return single bits of 32 elements, in four bytes."""
    return Plane(1, tuple((start + e // 8, e % 8) for e in range(32)))


def _plane(width: int, place: Callable[[int], tuple[int, int]]) -> Plane:
    return Plane(width, tuple(map(place, range(256))))


def _table(grids: Iterable[Grid]) -> dict[str, Grid]:
    return {grid.name: grid for grid in grids}


def _float8() -> tuple[float, ...]:
    """Return the values of E4M3 without infinities, as torch has them."""
    codes = torch.arange(256, dtype=torch.uint8, device="cpu")
    return tuple(codes.view(torch.float8_e4m3fn).float().tolist())


# Of 64 elements in 32 bytes, the first 32 have the low halves; of 128 in Q6_K, the first 64.
_HALVES_OF_64 = _plane(4, lambda e: (e // 64 * 32 + e % 32, e // 32 % 2 * 4))
# Twice E2M1, as ggml has it; and the levels of non-linear quants.
_FLOAT4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
GRIDS = _table(
    [
        Grid("Q4_0", 18, (_halves(2),), _symmetric, zero=8),
        Grid("Q4_1", 20, (_halves(4),), _with_minimum),
        Grid("Q5_0", 22, (_halves(6), _bits(2)), _symmetric, zero=16),
        Grid("Q5_1", 24, (_halves(8), _bits(4)), _with_minimum),
        Grid(
            "Q8_0",
            34,
            (Plane(8, tuple((2 + e, 0) for e in range(32))),),
            _symmetric,
            zero=128,
            flipped=128,
        ),
        Grid(
            "Q4_K",
            144,
            (Plane(4, tuple((16 + byte, bit) for byte, bit in _HALVES_OF_64.places)),),
            _of_32,
        ),
        Grid(
            "Q5_K",
            176,
            (
                Plane(4, tuple((48 + byte, bit) for byte, bit in _HALVES_OF_64.places)),
                _plane(1, lambda e: (16 + e % 32, e // 32)),
            ),
            _of_32,
        ),
        Grid(
            "Q6_K",
            210,
            (
                _plane(4, lambda e: (e // 128 * 64 + e % 64, e // 64 % 2 * 4)),
                _plane(2, lambda e: (128 + e // 128 * 32 + e % 32, e // 32 % 4 * 2)),
            ),
            _of_16,
            zero=32,
            part=16,
        ),
        Grid("IQ4_NL", 18, (_halves(2),), _symmetric, levels=_NON_LINEAR),
        Grid("IQ4_XS", 136, (_parts(8, 32, 8),), _of_signed_6_bits, levels=_NON_LINEAR),
        Grid("MXFP4", 17, (_halves(1),), _of_power, levels=_FLOAT4),
        Grid("NVFP4", 36, (_parts(4, 16, 4),), _of_float8, levels=_FLOAT4, part=16),
        # In safetensors: codes alone.
        Grid("F8_E4M3", 1, (Plane(8, ((0, 0),)),), levels=_float8()),
        Grid("INT4", 4, (Plane(4, tuple((e // 2, e % 2 * 4) for e in range(8))),), zero=8),
    ]
)
"""Format by its name."""
