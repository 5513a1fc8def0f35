"""A sync as elements at flat places of the checkpoint's tensors, for loaders that know no columns.

Each element brings its place, in 4 bytes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pacatune.ops.columns import bits
from pacatune.sync.message import Columns, ColumnSet

_MAX_ELEMENTS = 2**31


class ElementPatch(NamedTuple):
    """Some elements of one tensor of the checkpoint, as they are now."""

    name: str
    """Name of the tensor in the checkpoint."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    dtype: torch.dtype
    """Dtype of the values."""
    indices: Tensor
    """(N,) int32, where the elements are in the flattened tensor; they increase."""
    values: Tensor
    """(N,) contiguous."""


def element_patches(columns: Columns) -> list[ElementPatch]:
    """Return what a sync brings as elements: those that were changed, if it follows one.

    Another sync has all elements of the columns. Nothing here takes columns back that leave the
    selection: patch with `source.base_columns()` before the adapter or its columns change.

    Args:
        columns: The sync, as the source gave it.

    Raises:
        ValueError: If a tensor has 2**31 elements.
    """
    patches, new = [], columns.by_name()
    last = {} if columns.last is None else columns.positions.by_name(columns.last)
    for item in columns.positions.sets:
        values = new[item.name].flatten()
        places = _places(item, values.device)
        if (old := last.get(item.name)) is not None:
            is_changed = bits(values) != bits(old.flatten())
            places, values = places[is_changed], values[is_changed]
        if len(values):
            patches.append(ElementPatch(item.name, item.shape, item.dtype, places, values))
    return patches


def _places(column_set: ColumnSet, device: torch.device) -> Tensor:
    """Return where each element of columns is in the flattened tensor, in the columns' order."""
    if (size := math.prod(column_set.shape)) > _MAX_ELEMENTS:
        raise ValueError(
            f"{column_set.name!r} has {size} elements, and int32 counts {_MAX_ELEMENTS}; "
            "leave it out of the targets, or send columns."
        )
    shape, dim = column_set.shape, column_set.dim
    rows = torch.arange(math.prod(shape[:dim]), device=device) * shape[dim]
    inner = torch.arange(math.prod(shape[dim + 1 :]), device=device)
    columns = rows[:, None] + column_set.indices.to(device)
    return (columns[..., None] * len(inner) + inner).flatten().int()
