"""Patterns: which of the U kept columns of a weight each of its rows trains.

    indices (U,)     the columns of which anything is trained, and what is kept of an input
    places  None     every row trains all of them: delta is (O, U), R = U, as in the paper
    places  (G, R)   row groups: rows g O/G to (g + 1) O/G - 1 train indices[places[g]], R of the U,
                     so delta is (O, R)

Whatever computes with columns, stores or sends them sees all U: an `expand`ed update, which is zero
where a row does not train a column, and a gradient of it, of which the trained part is `collect`ed.
"""

import torch
from torch import Tensor


def expand(delta: Tensor, places: Tensor | None, num_columns: int, dim: int = 1) -> Tensor:
    """Return an update of all U columns; without a pattern, `delta` itself.

    Args:
        delta: (..., O, R, ...) update.
        places: (G, R) int64, see above.
        num_columns: U.
        dim: Dimension of the R; the rows are in the one before.

    Returns:
        (..., O, U, ...), differentiable.
    """
    if places is None:
        return delta
    grouped = _by_group(delta, places, dim)
    shape = list(grouped.shape)
    shape[dim + 1] = num_columns
    whole = grouped.new_zeros(shape).scatter(dim + 1, _index(places, grouped, dim), grouped)
    return whole.flatten(dim - 1, dim)


def collect(update: Tensor, places: Tensor | None, dim: int = 1) -> Tensor:
    """Return what of an (..., O, U, ...) update its rows train, (..., O, R, ...)."""
    if places is None:
        return update
    grouped = _by_group(update, places, dim)
    return grouped.gather(dim + 1, _index(places, grouped, dim)).flatten(dim - 1, dim)


def _by_group(update: Tensor, places: Tensor, dim: int) -> Tensor:
    """Return (..., O, R, ...) as (..., G, O/G, R, ...); a process may have no rows at all."""
    return update.unflatten(dim - 1, (len(places), update.shape[dim - 1] // max(len(places), 1)))


def _index(places: Tensor, grouped: Tensor, dim: int) -> Tensor:
    """Return `places` for (..., G, O/G, U, ...), by a view."""
    groups, rank = places.shape
    ones, sizes = [1] * grouped.dim(), list(grouped.shape)
    ones[dim - 1], ones[dim + 1] = groups, rank
    sizes[dim + 1] = rank
    return places.view(ones).expand(sizes)


def columns_of(indices: Tensor, places: Tensor | None) -> Tensor:
    """Return the columns that each row trains: (R,), or (G, R) of row groups."""
    return indices if places is None else indices[places]


def form_of(indices: Tensor, places: Tensor | None) -> tuple[int, int]:
    """Return G and R."""
    return (1, indices.numel()) if places is None else (len(places), places.shape[-1])


def divide(columns: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the indices and places of what `columns_of` returns."""
    if columns.dim() == 1:
        return columns, None
    indices, places = torch.unique(columns, return_inverse=True)
    return indices, places


def refuse_misfit(
    indices: Tensor, places: Tensor | None, rank: int, num_rows: int | None = None
) -> None:
    """Refuse columns and a pattern of another form than an update of so many columns and rows."""
    if indices.dim() != 1 or indices.dtype != torch.int64:
        raise ValueError(
            f"`indices` must be (R,) int64, got shape {tuple(indices.shape)} of {indices.dtype}."
        )
    if places is None:
        if len(indices) != rank:
            raise ValueError(f"`delta` is of {rank} columns, and `indices` has {len(indices)}.")
    elif places.dim() != 2 or places.dtype != torch.int64 or places.shape[1] != rank:
        raise ValueError(
            f"`places` must be (G, R={rank}) int64 to fit `delta`, got shape "
            f"{tuple(places.shape)} of {places.dtype}."
        )
    elif num_rows is not None and num_rows % len(places):
        raise ValueError(
            f"`places` has {len(places)} row groups, which must divide O={num_rows}; give each "
            "group as many rows."
        )
