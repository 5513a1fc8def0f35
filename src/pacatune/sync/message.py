"""What a trainer sends after each step: where the columns are, and what is in them.

A wire carries a few words (JSON) and one flat buffer of bytes. Columns are in the buffer one tensor
after the other, those of the widest dtype first, so that each begins where its dtype can be read.
Where bytes count, a sync that follows one is compressed: by how many representable numbers each
element has moved, which are few, and of most elements none.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pacatune.grid.columns import WeightColumns, columns_shape
from pacatune.precision import dtype_name, torch_dtype

_CODES = torch.float8_e4m3fn


@dataclass(frozen=True, kw_only=True, eq=False)
class ColumnSet(WeightColumns):
    """The trained columns of one tensor: where they are, and in which dtype they are served."""

    parameter: str
    """Name of the trainer's parameter; mostly that of the checkpoint's tensor."""

    @classmethod
    def at(cls, *, dtype: torch.dtype, **places: Any) -> "ColumnSet":
        """Return columns without what is in them; `places` are the other fields."""
        shape = columns_shape(places["shape"], places["dim"], len(places["indices"]))
        return cls(values=torch.empty(shape, dtype=dtype, device="meta"), **places)


@dataclass(frozen=True, kw_only=True, eq=False)
class Positions:
    """Where all columns of an adapter are: one object for all syncs that have the same ones."""

    sets: tuple[ColumnSet, ...] = field(repr=False)
    """The columns of each tensor."""
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    """Shapes of the trainer's parameters, which a server may have joined to the trained ones."""
    run: str
    """Tells one source from another, whose counting begins again."""

    def __post_init__(self) -> None:
        """Refuse sets that do not fit."""
        if not self.sets:
            raise ValueError("`sets` is empty; a trainer has columns of at least one tensor.")
        for name, shape in self.shapes.items():
            if any(size < 0 for size in shape):
                raise ValueError(f"`shapes` has a negative size of {name!r}: {shape}.")
        for item in self.sets:
            _served_dtype(dtype_name(item.dtype))

    @cached_property
    def num_bytes(self) -> int:
        """Size of all columns."""
        return sum(item.values.nbytes for item in self.sets)

    @cached_property
    def words(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return {
            "run": self.run,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "sets": {
                item.name: {
                    "parameter": item.parameter,
                    "dim": item.dim,
                    "shape": list(item.shape),
                    "dtype": dtype_name(item.dtype),
                    "indices": item.indices.tolist(),
                }
                for item in self.sets
            },
        }

    def by_name(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return the columns in a (num_bytes,) uint8 buffer, by their tensors' names, as views."""
        start, views = 0, {}
        for item in sorted(self.sets, key=lambda item: -item.dtype.itemsize):
            part = buffer[start : start + item.values.nbytes]
            views[item.name] = part.view(item.dtype).view(item.values.shape)
            start += item.values.nbytes
        return views


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns:
    """A sync: all columns after a step."""

    positions: Positions = field(repr=False)
    number: int
    """Counts the source's syncs from 1 on."""
    buffer: Tensor = field(repr=False)
    """(num_bytes,) uint8."""
    last: Tensor | None = field(default=None, repr=False)
    """The buffer of the sync that this follows; None: a wire carries this one as it is."""

    def __post_init__(self) -> None:
        """Refuse a buffer of another size."""
        expected = self.positions.num_bytes
        if self.buffer.dtype != torch.uint8 or self.buffer.shape != (expected,):
            raise ValueError(
                f"the columns must be {expected} bytes, got {tuple(self.buffer.shape)} of "
                f"{self.buffer.dtype}; the message is damaged, send it again."
            )

    @property
    def num_bytes(self) -> int:
        """Size of the buffer; what `to_wire` makes of it may be smaller."""
        return self.buffer.nbytes

    def by_name(self) -> dict[str, Tensor]:
        """Return the columns by their tensors' names, as views of the buffer."""
        return self.positions.by_name(self.buffer)


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


def _compressed(columns: Columns, last: Tensor) -> Tensor:
    """Return (B,) uint8, what has changed of columns since the last sync."""
    before = columns.positions.by_name(last)
    moved = torch.cat([_moved(new, before[name]) for name, new in columns.by_name().items()])
    # Runs of zeros and the frequencies of bytes are all that there is to find.
    compressor = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    compressed = compressor.compress(moved.cpu().numpy().data) + compressor.flush()
    return torch.frombuffer(bytearray(compressed), dtype=torch.uint8)


def _restored(buffer: Tensor, last: Columns) -> Tensor:
    """Return (num_bytes,) uint8, the columns after the last ones."""
    size, reader = last.num_bytes, zlib.decompressobj()
    try:
        data = reader.decompress(buffer.cpu().contiguous().numpy().data, size + 1)
    except zlib.error as error:
        raise ValueError(f"the message is damaged: {error}.") from error
    if len(data) != size or not reader.eof or reader.unused_data:
        raise ValueError(f"the message is damaged: it does not have {size} bytes.")
    moved = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(last.buffer.device)
    parts, start = [], 0
    for old in last.by_name().values():
        parts.append(_moved_to(moved[start : start + old.nbytes], old))
        start += old.nbytes
    return torch.cat(parts)


def to_wire(columns: Columns, *, compress: bool = True) -> tuple[dict[str, Any], Tensor]:
    """Return a sync as words that JSON can hold and (B,) uint8.

    Args:
        columns: What a `ColumnSource` gives.
        compress: Make a sync that follows one as small as it can be, on the CPU. Where the wire
            carries some hundred MB a second, that takes longer than sending.
    """
    words: dict[str, Any] = {"kind": "columns", "number": columns.number}
    if compress and columns.last is not None:
        small = _compressed(columns, columns.last)
        if small.nbytes < columns.num_bytes:
            return words | {"since": columns.number - 1, "run": columns.positions.run}, small
    return words | {"since": 0, "positions": columns.positions.words}, columns.buffer


class Reader:
    """Turns what a wire carries, in order, into syncs."""

    def __init__(self) -> None:
        self._last: Columns | None = None

    def read(self, words: Mapping[str, Any], buffer: Tensor) -> Columns:
        """Return the sync of `to_wire`; its positions are the last one's where they are the same.

        Raises:
            ValueError: If a part is missing or has another type, or the sync follows another than
                the last one that was read.
        """
        last = self._last
        try:
            number, since = int(words["number"]), int(words["since"])
            if since:
                if last is None or (words["run"], since) != (last.positions.run, last.number):
                    raise ValueError(
                        f"sync {number} follows sync {since}, which is not the last one here; call "
                        "`source.forget()` before the next `send`."
                    )
                positions, buffer = last.positions, _restored(buffer, last)
            elif last is not None and words["positions"] == last.positions.words:
                positions = last.positions
            else:
                positions = _positions(words["positions"])
            columns = Columns(positions=positions, number=number, buffer=buffer)
        except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"this is no message of a ColumnSource ({type(error).__name__}: {error})."
            ) from error
        self._last = columns
        return columns


def _positions(words: Mapping[str, Any]) -> Positions:
    sets = tuple(
        ColumnSet.at(
            name=str(name),
            parameter=str(entry["parameter"]),
            dim=int(entry["dim"]),
            shape=tuple(int(size) for size in entry["shape"]),
            dtype=_served_dtype(entry["dtype"]),
            indices=torch.tensor(entry["indices"], dtype=torch.int64, device="cpu"),
        )
        for name, entry in words["sets"].items()
    )
    shapes = {str(k): tuple(int(n) for n in size) for k, size in words["shapes"].items()}
    return Positions(sets=sets, shapes=shapes, run=str(words["run"]))


def _served_dtype(name: str) -> torch.dtype:
    """Return a dtype whose elements are bytes of their own."""
    return _CODES if name == dtype_name(_CODES) else torch_dtype(name, option="dtype")
