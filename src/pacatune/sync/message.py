"""What a trainer sends: where the columns are, once, then what is in them, after each step.

Both are a few words (JSON) and one flat buffer of bytes, which is all that a transport carries.
Columns are in the buffer one tensor after the other, those of the widest dtype first, so that each
begins where its dtype can be read. Where a sync follows one, and bytes count, it is compressed: by
how many representable numbers each element has moved, which are few, and of most elements none.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pacatune.patch.edit import ColumnPlace
from pacatune.precision import dtype_name, torch_dtype

_DIGEST_DIGITS = 16
_CODES = torch.float8_e4m3fn


@dataclass(frozen=True, kw_only=True, eq=False)
class ColumnSet(ColumnPlace):
    """The trained columns of one tensor: where they are, not what is in them."""

    parameter: str
    """Name of the trainer's parameter; mostly that of the checkpoint's tensor."""
    dtype: torch.dtype
    """In which the columns are sent, and served."""

    @cached_property
    def num_bytes(self) -> int:
        """Size of the columns."""
        return math.prod(self.columns_shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, eq=False)
class Positions:
    """Where all columns of an adapter are; sent before its first columns."""

    sets: tuple[ColumnSet, ...] = field(repr=False)
    """In the order in which their columns are sent, without columns that were not changed."""
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    """Shapes of the parameters beside the trained ones, which a server may have joined to them."""
    run: str
    """Tells one source from another, whose counting begins again."""
    version: str = field(init=False)
    """Differs where anything of this does."""

    def __post_init__(self) -> None:
        """Refuse sets that do not fit; compute the version."""
        if not self.sets:
            raise ValueError("`sets` is empty; a trainer has columns of at least one tensor.")
        for name, shape in (*self.shapes.items(), *((one.name, one.shape) for one in self.sets)):
            if any(size < 0 for size in shape):
                raise ValueError(f"`shapes` has a negative size of {name!r}: {shape}.")
        names = [one.name for one in self.sets]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"`sets` has {twice!r} twice; a tensor has one set of columns.")
        for one in self.sets:
            one.check(repr(one.name))
            _served_dtype(dtype_name(one.dtype), f"dtype of {one.name}")
        digest = hashlib.sha256(json.dumps(_describe(self), sort_keys=True).encode())
        for one in self.sets:
            digest.update(one.indices.numpy().data)
        object.__setattr__(self, "version", digest.hexdigest()[:_DIGEST_DIGITS])

    def layout(self, ordinals: Iterable[int]) -> "Places":
        """Return each of some sets with its number and where its columns begin in the buffer."""
        start, result = 0, []
        widest_first = sorted(ordinals, key=lambda number: -self.sets[number].dtype.itemsize)
        for number in widest_first:
            result.append((number, self.sets[number], start))
            start += self.sets[number].num_bytes
        return result


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns:
    """What is in the columns after a step: all of them, or those that were changed."""

    version: str
    """Version of the positions that the columns are at."""
    number: int
    """Counts the source's syncs from 1 on."""
    since: int
    """0: all columns are here. Otherwise what is not is as in the sync of that number."""
    ordinals: tuple[int, ...] = field(repr=False)
    """Which of the positions' sets are here."""
    buffer: Tensor = field(repr=False)
    """(num_bytes,) uint8."""
    compressed: bool = False
    """Whether the buffer is what the wire has of a change."""
    follows: "tuple[Places, Mapping[str, Tensor]] | None" = field(default=None, repr=False)
    """Where the columns are in the buffer, and the last sync's by name; where these are known."""

    @property
    def num_bytes(self) -> int:
        """Size of the buffer; what `to_wire` makes of it may be smaller."""
        return self.buffer.nbytes

    def check(self, positions: Positions) -> None:
        """Refuse columns of other positions, or of tensors that these do not have."""
        if self.version != positions.version:
            raise ValueError(
                f"the columns belong to positions {self.version}, not to {positions.version}; send "
                "`source.positions()` whenever they change, as `source.send` does."
            )
        known, given = len(positions.sets), {*self.ordinals}
        if not given <= {*range(known)} or len(given) < len(self.ordinals):
            raise ValueError(f"the columns name tensors beyond the {known} known, or one twice.")
        if self.since == 0 and (self.compressed or len(given) < known):
            raise ValueError(f"the columns are of {len(given)} tensors, not of all {known}.")

    def by_name(
        self, positions: Positions, last: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the columns by their tensors' names, mostly as views of the buffer.

        Args:
            positions: Those that the columns are at.
            last: Columns of the sync that this follows, by name.

        Raises:
            ValueError: If they belong to other positions, or the buffer has another size.
        """
        self.check(positions)
        places = positions.layout(self.ordinals)
        buffer = _restored(self.buffer, places, last or {}) if self.compressed else self.buffer
        expected = sum(one.num_bytes for _, one, _ in places)
        if buffer.dtype != torch.uint8 or buffer.shape != (expected,):
            raise ValueError(
                f"the columns must be {expected} bytes, got {tuple(buffer.shape)} of "
                f"{buffer.dtype}; the message is damaged, send it again."
            )
        return {one.name: view_of(buffer, one, start) for _, one, start in places}


def view_of(buffer: Tensor, one: ColumnSet, start: int) -> Tensor:
    """Return the columns of one tensor as a view of the buffer."""
    return buffer[start : start + one.num_bytes].view(one.dtype).view(one.columns_shape)


Places = list[tuple[int, ColumnSet, int]]
"""What `Positions.layout` returns."""


def _moved(new: Tensor, old: Tensor) -> Tensor:
    """Return (N * itemsize,) uint8: how far each of N elements is from the old one.

    Bits of floating-point numbers are ordered as these are, but for the sign: so the distance is a
    whole number, small for a small step. It has the sign in its lowest bit, and all elements' low
    bytes come first: what is left is mostly zeros.
    """
    distance = _ordered(new.flatten()) - _ordered(old.flatten())
    distance = (distance << 1) ^ (distance >> 8 * new.itemsize - 1)
    return distance.view(torch.uint8).view(-1, new.itemsize).T.flatten()


def _moved_to(moved: Tensor, old: Tensor) -> Tensor:
    """Return the new elements, as bytes: the inverse."""
    start = _ordered(old.flatten())
    distance = moved.view(old.itemsize, -1).T.flatten().view(start.dtype)
    distance = ((distance >> 1) & torch.iinfo(start.dtype).max) ^ -(distance & 1)
    return _ordered(start + distance).view(torch.uint8)


def _ordered(numbers: Tensor) -> Tensor:
    """Return numbers as integers of the same order; with a view as their dtype, its own inverse."""
    whole = numbers.view(getattr(torch, f"int{8 * numbers.itemsize}"))
    return whole ^ ((whole >> 8 * whole.itemsize - 1) & torch.iinfo(whole.dtype).max)


def _compressed(buffer: Tensor, places: Places, last: Mapping[str, Tensor]) -> Tensor:
    """Return (B,) uint8, what has changed of columns since the last sync."""
    moved = torch.cat([_moved(view_of(buffer, one, at), last[one.name]) for _, one, at in places])
    # Runs of zeros and the frequencies of bytes are all that there is to find.
    compressor = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    found = compressor.compress(moved.cpu().numpy().data) + compressor.flush()
    return torch.frombuffer(bytearray(found), dtype=torch.uint8)


def _restored(buffer: Tensor, places: Places, last: Mapping[str, Tensor]) -> Tensor:
    """Return (B,) uint8, the columns."""
    size, reader = sum(one.num_bytes for _, one, _ in places), zlib.decompressobj()
    if missing := [one.name for _, one, _ in places if one.name not in last]:
        raise ValueError(
            f"what was sent of {missing[0]!r} follows a sync which is not here; call "
            "`source.forget()` before the next `send`."
        )
    try:
        found = reader.decompress(buffer.cpu().contiguous().numpy().data, size + 1)
    except (zlib.error, TypeError, RuntimeError) as error:
        raise ValueError(f"the message is damaged: {error}.") from error
    if len(found) != size or not reader.eof or reader.unused_data:
        raise ValueError(f"the message is damaged: it does not have {size} bytes.")
    moved = torch.frombuffer(bytearray(found), dtype=torch.uint8).to(buffer.device)
    return torch.cat(
        [
            _moved_to(moved[at : at + one.num_bytes], last[one.name].to(buffer.device))
            for _, one, at in places
        ]
    )


def to_wire(
    message: Positions | Columns, *, compress: bool = True
) -> tuple[dict[str, Any], Tensor]:
    """Return a message as words that JSON can hold and (B,) uint8.

    Args:
        message: What a `ColumnSource` gives.
        compress: Make a sync that follows one as small as it can be, on the CPU. Where the wire
            carries some hundred MB a second, that takes longer than sending.
    """
    if isinstance(message, Columns):
        since, buffer = message.since, message.buffer
        small = _compressed(buffer, *message.follows) if compress and message.follows else None
        if is_small := small is not None and small.nbytes < buffer.nbytes:
            since, buffer = message.number - 1, small
        words = {
            "kind": "columns",
            "version": message.version,
            "number": message.number,
            "since": since,
            "ordinals": list(message.ordinals),
            "compressed": message.compressed or is_small,
        }
        return words, buffer
    buffer = torch.cat([one.indices for one in message.sets])
    return {"kind": "positions", **_describe(message)}, buffer.view(torch.uint8)


def from_wire(words: Mapping[str, Any], buffer: Tensor) -> Positions | Columns:
    """Return the message of `to_wire`; whoever reads it checks that it fits the positions.

    Raises:
        ValueError: If a part is missing or has another type.
    """
    try:
        if words["kind"] == "columns":
            return Columns(
                version=str(words["version"]),
                number=int(words["number"]),
                since=int(words["since"]),
                ordinals=tuple(int(number) for number in words["ordinals"]),
                compressed=bool(words["compressed"]),
                buffer=buffer,
            )
        if buffer.dtype != torch.uint8 or buffer.dim() != 1:
            raise TypeError(f"its buffer is {tuple(buffer.shape)} of {buffer.dtype}")
        sets, start = [], 0
        indices = buffer.cpu().view(torch.int64)
        for entry in words["sets"]:
            end = start + int(entry["num_columns"])
            sets.append(
                ColumnSet(
                    name=str(entry["name"]),
                    parameter=str(entry["parameter"]),
                    dim=int(entry["dim"]),
                    shape=tuple(int(size) for size in entry["shape"]),
                    dtype=_served_dtype(entry["dtype"], "dtype"),
                    indices=indices[start:end],
                )
            )
            start = end
        if start != len(indices):
            raise TypeError(f"it has {len(indices)} column numbers, and names {start}")
        shapes = {str(k): tuple(int(n) for n in size) for k, size in words["shapes"].items()}
        return Positions(sets=tuple(sets), shapes=shapes, run=str(words["run"]))
    except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"this is no message of a ColumnSource ({type(error).__name__}: {error})."
        ) from error


def _served_dtype(name: str, option: str) -> torch.dtype:
    """Return a dtype whose elements are bytes of their own."""
    return _CODES if name == dtype_name(_CODES) else torch_dtype(name, option=option)


def _describe(positions: Positions) -> dict[str, Any]:
    return {
        "run": positions.run,
        "shapes": {name: list(shape) for name, shape in positions.shapes.items()},
        "sets": [
            {
                "name": one.name,
                "parameter": one.parameter,
                "dim": one.dim,
                "shape": list(one.shape),
                "dtype": dtype_name(one.dtype),
                "num_columns": one.rank,
            }
            for one in positions.sets
        ],
    }
