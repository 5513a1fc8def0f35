"""Trained columns as codes of the file that their model was dequantised from."""

from typing import Any

import torch
from torch import Tensor

from pacatune.grid.checkpoint import PackedCheckpoint, heads_of, row_order


class CodedColumns:
    """The trained columns of one weight, as codes of the file that it was dequantised from.

    Args:
        checkpoint: The file or folder.
        name: Of the weight there; one that is quantised.
        columns: (O, R), the base's, in the model's dtype.
        indices: (R,), which these are.
        config: Of the model.

    Raises:
        ValueError: If the file does not hold these columns.
    """

    def __init__(
        self, checkpoint: PackedCheckpoint, name: str, columns: Tensor, indices: Tensor, config: Any
    ) -> None:
        grid, indices = checkpoint.grid(name), indices.cpu()
        if grid is None:
            raise ValueError(f"{checkpoint.title} holds {name!r} as plain numbers, not as codes.")
        self.grid, self.columns = grid, columns.detach().cpu()
        values = checkpoint.values(name, indices)
        self.order = row_order(values, self.columns, heads_of(config), name)
        self.before = checkpoint.columns(name, 1, indices)
        self._scale, self._minimum = checkpoint.scales(name, indices)

    def nearest(self, change: Tensor) -> Tensor:
        """Return (O, R) uint8, the codes nearest to changed columns, in rows as the file has."""
        change = change.detach().float().cpu()[self.order]
        if not change.isfinite().all():
            raise ValueError("columns are not finite: training has diverged; go back.")
        return self.grid.moved(self.before, self._scale, change).after

    def values(self, codes: Tensor) -> Tensor:
        """Return what codes are to the model, (O, R) in its dtype and order of rows."""
        values = self.grid.values(codes, self._scale, self._minimum).to(self.columns.dtype)
        found = torch.empty_like(values)
        found[self.order] = values
        return found
