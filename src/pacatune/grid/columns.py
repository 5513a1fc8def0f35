"""Some columns of one weight: what a patch, a sync, a merge and a quantised file speak of.

A column is one index along one dimension of a tensor: dimension 1 of a linear layer's (O, I)
weight, 0 of a Conv1D's (I, O), the last one of (E, O, I) experts. Bits are compared and copied,
never numbers: -0.0 is not 0.0, and NaN equals itself.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pacatune.grid.formats import GRIDS
from pacatune.ops.columns import bits, check_columns, put_columns_, read_columns


def read_bits(tensor: Tensor, dim: int, indices: Tensor) -> Tensor:
    """Return some columns, whose bits are kept."""
    return read_columns(bits(tensor), indices, dim=dim).view(tensor.dtype)


def put_bits_(tensor: Tensor, dim: int, indices: Tensor, columns: Tensor) -> None:
    """Write the bits of some columns, in place."""
    put_columns_(bits(tensor), indices, bits(columns), dim=dim)


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightColumns:
    """Some columns of one tensor of a checkpoint: where they are, and what is in them."""

    name: str
    """Name of the tensor in the checkpoint, such as `model.layers.0.mlp.down_proj.weight`."""
    dim: int
    """Dimension of the tensor along which the columns are."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    indices: Tensor
    """(R,) int64, the columns in increasing order."""
    values: Tensor
    """`shape` with R in place of `shape[dim]`. On the meta device it says where columns are and of
    which dtype, not what is in them."""
    grid: str = ""
    """Format of a quantised tensor, such as `Q4_1`: the values are its codes then, (O, R) uint8.
    Empty: numbers."""

    def __post_init__(self) -> None:
        """Refuse what columns of such a tensor cannot be."""
        where, dim, shape = f"the columns of {self.name!r}", self.dim, self.shape
        if not 0 <= dim < len(shape):
            raise ValueError(f"{where}: `dim` ({dim}) must be one of the dimensions of {shape}.")
        if self.indices.dim() != 1 or not len(self.indices):
            raise ValueError(f"{where}: `indices` must be (R,), got {tuple(self.indices.shape)}.")
        # On a GPU they came from a CPU (`to`), and to look at them would wait for it.
        if self.indices.device.type == "cpu":
            check_columns(self.indices, shape[dim], f"{where}: `indices`")
        needed = columns_shape(shape, dim, self.rank)
        if tuple(self.values.shape) != needed:
            raise ValueError(
                f"{where}: `values` must be {needed} to fit {self.rank} columns along dimension "
                f"{dim} of {shape}, got {tuple(self.values.shape)}."
            )
        if self.grid:
            self._check_codes(where)

    def _check_codes(self, where: str) -> None:
        grid = GRIDS.get(self.grid)
        if grid is None or self.dim != 1 or len(self.shape) != 2 or self.dtype != torch.uint8:
            raise ValueError(
                f"{where}: the format {self.grid[:20]!r}, or its codes, are not known here; "
                f"formats are {', '.join(GRIDS)}, of uint8 codes of (O, I) matrices."
            )
        if int(self.values.max()) >= grid.num_codes:
            raise ValueError(f"{where}: {self.grid} has codes below {grid.num_codes} alone.")

    @classmethod
    def of(cls, name: str, dim: int, tensor: Tensor, indices: Tensor) -> "WeightColumns":
        """Return what a tensor of numbers has in some columns."""
        values = read_bits(tensor, dim, indices).contiguous()
        return cls(name=name, dim=dim, shape=tuple(tensor.shape), indices=indices, values=values)

    @property
    def rank(self) -> int:
        """Number of columns."""
        return len(self.indices)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.values.dtype

    @property
    def form(self) -> "str | torch.dtype":
        """Format of a quantised tensor, or dtype of another."""
        return self.grid or self.dtype

    def to(self, device: torch.device | str) -> "WeightColumns":
        """Return the same on a device."""
        return replace(self, indices=self.indices.to(device), values=self.values.to(device))


def columns_shape(shape: tuple[int, ...], dim: int, rank: int) -> tuple[int, ...]:
    """Return the shape of some columns: `shape` with R in place of `shape[dim]`."""
    return (*shape[:dim], rank, *shape[dim + 1 :])


def columns_beside(indices: Tensor, num_columns: int, most: int) -> Tensor:
    """Return at `most` so many of a tensor's other columns, at equal distances; on the CPU."""
    is_free = torch.ones(num_columns, dtype=torch.bool, device="cpu")
    is_free[indices.cpu()] = False
    return spread(is_free.nonzero().flatten(), most)


def spread(positions: Tensor, most: int) -> Tensor:
    """Return at `most` so many of some positions, at equal distances."""
    return positions[:: max(1, -(-len(positions) // most))]
