"""A checkpoint some of whose matrices are codes: their columns are read and written in place."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pacatune.files.checkpoint import DTYPES, Checkpoint
from pacatune.grid.formats import GRIDS, Grid, Moved
from pacatune.ops.columns import adapted_columns


@dataclass(frozen=True, kw_only=True)
class PackedCheckpoint(Checkpoint, ABC):
    """Tensors of which some are quantised. Columns of these are (O, R) uint8 codes."""

    def grid(self, name: str) -> Grid | None:
        """Return the grid of a tensor; None if it holds plain numbers.

        Raises:
            ValueError: If it is of another format.
        """
        kind = self.entries[name].dtype
        if kind in DTYPES:
            return None
        if kind not in GRIDS:
            raise ValueError(
                f"{self.title} holds {name!r} as {kind}, whose codes cannot be trained; formats "
                f"are {', '.join((*GRIDS, *DTYPES))}. Leave it out of the targets, or take a file "
                "in one of these."
            )
        return GRIDS[kind]

    @abstractmethod
    def name_of(self, parameter: str, num_blocks: int) -> str:
        """Return the name here of a parameter of transformers; a ValueError if there is none."""

    @abstractmethod
    def rows(self, name: str) -> Tensor:
        """Return (O, bytes) uint8, the rows of a quantised matrix, in the file's order."""

    @abstractmethod
    def scales(self, name: str, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and minimum, (O, R) float32, of columns of a quantised matrix."""

    def scale_of(self, name: str) -> Tensor | None:
        """Return the (O / a, I / b) float32 scales of a x b elements; None: they are in blocks."""
        return None

    def values(self, name: str, dim: int, indices: Tensor) -> Tensor:
        """Return the numbers in columns, whether they are codes or not."""
        columns = self.columns(name, dim, indices)
        if (grid := self.grid(name)) is None:
            return columns
        return grid.values(columns, *self.scales(name, indices))

    def columns(self, name: str, dim: int, indices: Tensor) -> Tensor:
        """Return columns; of a quantised matrix their codes."""
        if (grid := self.grid(name)) is None:
            return super().columns(name, dim, indices)
        return grid.codes(self.rows(name), indices)

    def put_columns_(
        self, memory: Any, name: str, dim: int, indices: Tensor, columns: Tensor
    ) -> None:
        """Write columns, or their codes, into the mapped file."""
        if (grid := self.grid(name)) is None:
            super().put_columns_(memory, name, dim, indices, columns)
            return
        entry = self.entries[name]
        grid.put_codes_(entry.window(memory).view(entry.shape[0], -1), indices, columns)

    def touched(self, name: str, dim: int, indices: Tensor, step: int) -> Tensor:
        """Return the places of all bytes in the file that columns lie in."""
        if (grid := self.grid(name)) is None:
            return super().touched(name, dim, indices, step)
        entry = self.entries[name]
        rows = torch.arange(entry.shape[0], device="cpu")
        starts = entry.start + rows * grid.row_bytes(entry.shape[1])
        bytes_ = torch.cat([byte for byte, _ in grid.byte_places(indices)])
        return (starts[:, None] + bytes_).flatten()


class FileColumns:
    """Trained columns of a matrix as its file has them, where the model has them.

    Args:
        checkpoint: The file or folder that the model was dequantised from.
        parameter: What the model calls the matrix.
        columns: (O, R), what the model has there.
        indices: (R,), which columns.
        config: The model's, a text model's part of it.

    Raises:
        ValueError: If the file has no such matrix, does not hold these columns, or has a format
            that is not known.
    """

    def __init__(
        self,
        checkpoint: PackedCheckpoint,
        parameter: str,
        columns: Tensor,
        indices: Tensor,
        config: Any,
    ) -> None:
        self.name = checkpoint.name_of(parameter, config.num_hidden_layers)
        self.grid = checkpoint.grid(self.name)
        """None: they are numbers."""
        indices, device = indices.cpu(), columns.device
        values = before = checkpoint.columns(self.name, 1, indices)
        if self.grid is not None:
            scales = checkpoint.scales(self.name, indices)
            self._scale, self._minimum = (part.to(device) for part in scales)
            values = self.grid.values(before, *scales)
        self.before = before.to(device)
        """(O, R), the base's, in the file's order of rows."""
        names = ("num_attention_heads", "num_key_value_heads")
        heads = filter(None, (getattr(config, name, None) for name in names))
        self.order = _row_order(values.to(device), columns.detach(), heads, self.name)
        """(O,), which row of the model's matrix each row of the file is."""

    def moved(self, delta: Tensor, scaling: float) -> Moved:
        """Return what they are after an (O, R) update; as codes the nearest, see `Grid.moved`.

        Raises:
            ValueError: If an update is not finite.
        """
        delta = delta.detach().to(self.before.device).float()[self.order]
        if not delta.isfinite().all():
            raise ValueError(
                f"the columns of {self.name!r} are not finite: training has diverged; go back to a "
                "checkpoint."
            )
        if self.grid is None:
            after = adapted_columns(self.before, delta, scaling)
            return Moved(after, torch.zeros((), device=after.device))
        return self.grid.moved(self.before, self._scale, scaling * delta)

    def values(self, codes: Tensor) -> Tensor:
        """Return what codes are to the model, (O, R) float32 in its order of rows."""
        assert self.grid is not None, "numbers are what they are"
        values = self.grid.values(codes, self._scale, self._minimum)
        return torch.empty_like(values).index_copy_(0, self.order, values)


def _row_order(values: Tensor, columns: Tensor, heads: Iterable[int], name: str) -> Tensor:
    """Return which row of a weight each row of the file is, by (O, R) columns of both.

    llama.cpp lays the rows of some projections otherwise: of each head, the two halves that are
    rotated together alternate. Values decide, so it is also a check that the weight is the file's.
    """
    rows = torch.arange(len(columns), device=columns.device)
    halves = [
        rows.view(number, 2, -1).transpose(1, 2).flatten()
        for number in heads
        if len(columns) % (2 * number) == 0
    ]
    rounded = values.to(columns.dtype)
    fitting = [order for order in (rows, *halves) if torch.equal(columns[order], rounded)]
    if any(not torch.equal(order, fitting[0]) for order in fitting):
        raise ValueError(
            f"{name!r} has equal rows in the columns that are trained, which do not tell in what "
            "order the file lays them; train more columns of it, or other ones."
        )
    if fitting:
        return fitting[0]
    raise ValueError(
        f"the file does not hold {name!r} as the model has it; it is another model's, or its rows "
        "are laid in an order that is not known here."
    )
