"""Columns of a weight as codes of the file that its model was dequantised from."""

from typing import Any

import torch
from torch import Tensor

from pacatune.grid.checkpoint import PackedCheckpoint, heads_of, row_order
from pacatune.grid.formats import Moved


class CodedColumns:
    """Trained columns of one weight as codes, which are searched where `order` is.

    Args:
        checkpoint: The file or folder.
        name: What the weight is called there.
        indices: (R,), which columns.
        order: (O,), which row of the weight each row of the file is.
    """

    def __init__(
        self, checkpoint: PackedCheckpoint, name: str, indices: Tensor, order: Tensor
    ) -> None:
        grid = checkpoint.grid(name)
        assert grid is not None, "plain numbers are columns by themselves"
        self.name, self.grid, self.order = name, grid, order
        parts = checkpoint.columns(name, 1, indices), *checkpoint.scales(name, indices)
        self.before, self._scale, self._minimum = (part.to(order.device) for part in parts)
        """(O, R) uint8, the base's, in the file's order of rows."""

    @classmethod
    def of(
        cls, checkpoint: PackedCheckpoint, name: str, columns: Tensor, indices: Tensor, config: Any
    ) -> "CodedColumns":
        """Return them, seen to be the (O, R) columns that a model of this configuration has.

        Raises:
            ValueError: If the file does not hold these columns.
        """
        indices = indices.cpu()
        values = checkpoint.values(name, indices).to(columns.device)
        order = row_order(values, columns.detach(), heads_of(config), name)
        return cls(checkpoint, name, indices, order)

    def moved(self, change: Tensor) -> Moved:
        """Return the codes nearest to the columns after an (O, R) change, as `Grid.moved` does.

        Raises:
            ValueError: If a change is not finite.
        """
        change = change.detach().to(self.order.device).float()[self.order]
        if not change.isfinite().all():
            raise ValueError(
                f"the columns of {self.name!r} are not finite: training has diverged; go back to a "
                "checkpoint."
            )
        return self.grid.moved(self.before, self._scale, change)

    def values(self, codes: Tensor) -> Tensor:
        """Return what codes are to the model, (O, R) float32 in its order of rows."""
        values = self.grid.values(codes, self._scale, self._minimum)
        return torch.empty_like(values).index_copy_(0, self.order, values)
