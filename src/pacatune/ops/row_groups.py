"""Row groups: the outputs of a weight in G equal parts, each with R trained columns of its own.

    indices (R,)      all O rows train the same columns
    indices (G, R)    rows g O/G to (g + 1) O/G - 1 train the columns indices[g]

The update is (O, R) either way, and its gradient one product of each group's outputs with that
group's inputs. A column that several groups train is kept for backward once: U distinct columns of
x, at most G R and at most I. What a graph keeps must not depend on values, so a compiled graph
keeps the R of each group.

A convolution's own groups are something else (`columns.py`); one that has some has no row groups.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

__all__ = [
    "by_group",
    "by_rows",
    "check_indices",
    "distinct_and_places",
    "distinct_columns",
    "expected_distinct",
    "flat_positions",
    "held_indices",
    "hold_indices",
    "is_spread_out",
    "joined_groups",
    "kept_columns",
    "linear_of_groups",
    "note_distinct",
    "num_groups_of",
    "of_rows",
    "per_group",
    "places_in",
    "rank_of",
    "refined",
    "row_index",
    "select",
    "spread",
]

# Where distinct columns are a larger share of all, the input itself is kept: no copy is made, and
# layers that share an input keep it once. The seven layers of a Llama block have four inputs.
_MOST_COPIED = 1 / 2
# Indices -> their version, their distinct columns (U,), and where they are among these (G, R).
_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def num_groups_of(indices: Tensor) -> int:
    """Return G."""
    return len(indices) if indices.dim() == 2 else 1


def rank_of(indices: Tensor) -> int:
    """Return R, the number of columns that a row trains."""
    return indices.shape[-1]


def per_group(indices: Tensor) -> Tensor:
    """Return indices as (G, R)."""
    return indices if indices.dim() == 2 else indices.unsqueeze(0)


def check_indices(indices: Tensor, out_features: int | None = None) -> None:
    """Refuse indices of another form, and row groups that do not divide the outputs."""
    if indices.dim() not in (1, 2) or indices.dtype != torch.int64:
        raise ValueError(
            f"`indices` must be (R,) int64, got shape {tuple(indices.shape)} of {indices.dtype}; "
            "those of row groups are (G, R)."
        )
    if out_features is not None and indices.dim() == 2 and out_features % len(indices):
        raise ValueError(
            f"`indices` has {len(indices)} row groups, which must divide O={out_features}; give "
            "each group as many rows."
        )


def row_index(
    indices: Tensor, shape: Sequence[int] | torch.Size, dim: int = 1, row_dim: int = 0
) -> Tensor:
    """Return where columns of row groups are, for `gather` and `scatter` along `dim`.

    Args:
        indices: (G, R).
        shape: Shape of the weight, of any number of dimensions.
        dim: Its dimension of the columns.
        row_dim: Its dimension of the O rows.

    Returns:
        `shape` with R in place of `shape[dim]`; a view wherever dimensions are repeated.
    """
    groups, rank = indices.shape
    num_rows = shape[row_dim]
    index = indices.unsqueeze(1).expand(groups, num_rows // groups, rank).reshape(num_rows, rank)
    if dim < row_dim:
        index = index.t()
    ones, sizes = [1] * len(shape), list(shape)
    ones[row_dim], ones[dim] = num_rows, rank
    sizes[dim] = rank
    return index.reshape(ones).expand(sizes)


def flat_positions(
    indices: Tensor, shape: Sequence[int] | torch.Size, dim: int = 1, row_dim: int = 0
) -> Tensor:
    """Return where columns, those of row groups too, are in a contiguous weight's flat memory.

    Arguments and shape as for `row_index`.
    """
    places = torch.zeros((), dtype=torch.int64, device=indices.device)
    for number, size in enumerate(shape):
        one = torch.arange(size, device=indices.device).view(-1, *[1] * (len(shape) - number - 1))
        if number == dim:
            one = one[indices] if indices.dim() == 1 else row_index(indices, shape, dim, row_dim)
        places = places + one * math.prod(shape[number + 1 :])
    return places


def refined(indices: Tensor, times: int) -> Tensor:
    """Return the same columns of `times` as many groups, each a part of one before."""
    return per_group(indices).repeat_interleave(times, 0)


def of_rows(indices: Tensor, num_rows: int, first: int, last: int) -> Tensor:
    """Return the columns of the rows from `first` to before `last` of `num_rows`.

    Groups that the cut divides are refined to as many as it needs; a single one is (R,).
    """
    if indices.dim() == 1:
        return indices
    if first >= last:  # a process may have no rows
        return indices[0]
    num_own = num_rows // len(indices)
    size = math.gcd(num_own, first, last)
    indices = refined(indices, num_own // size)[first // size : last // size]
    return indices[0] if len(indices) == 1 else indices


def distinct_and_places(indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (U,) distinct columns of row groups, and their (G, R) places among these."""
    version = -1 if indices.is_inference() else indices._version
    known = _KNOWN.get(indices)
    if known is None or known[0] != version:
        with torch.inference_mode(False), torch.no_grad():  # training may follow an evaluation
            known = version, *torch.unique(indices, return_inverse=True)
        _KNOWN[indices] = known
    return known[1], known[2]


def expected_distinct(in_features: int, groups: int, rank: int) -> int:
    """Return how many distinct columns row groups train on average, chosen at random."""
    return round(in_features * (1 - (1 - rank / in_features) ** groups))


def note_distinct(indices: Tensor, distinct: Tensor, places: Tensor) -> None:
    """Say what is distinct in indices without values, as of a simulated step."""
    _KNOWN[indices] = indices._version, distinct, places


def hold_indices(ctx: Any, indices: Tensor | None) -> None:
    """Keep row groups' indices for a backward pass beside what autograd saves.

    What a hook on saved tensors (offloading) gives back is a copy, whose distinct columns would
    have to be found again.
    """
    is_held = indices is not None and indices.dim() == 2 and not torch.compiler.is_compiling()
    ctx.indices = indices if is_held else None


def held_indices(ctx: Any, saved: Tensor) -> Tensor:
    """Return the indices themselves, of which autograd has saved `saved`."""
    return saved if ctx.indices is None else cast(Tensor, ctx.indices)


def distinct_columns(indices: Tensor) -> Tensor:
    """Return the (U,) columns that any group trains, in increasing order; (R,) as they are."""
    return indices if indices.dim() == 1 else distinct_and_places(indices)[0]


def kept_columns(indices: Tensor, in_features: int) -> Tensor | None:
    """Return which columns of an input are kept for backward; None: the input itself."""
    columns = distinct_columns(indices)
    is_whole = indices.dim() == 2 and len(columns) > _MOST_COPIED * in_features
    return None if is_whole else columns


def select(x: Tensor, indices: Tensor) -> Tensor:
    """Return what is kept of an input for backward: its trained columns, each once.

    Args:
        x: (..., I).
        indices: (R,) or (G, R).

    Returns:
        (..., U), or `x` itself where that is most of it; in a compiled graph with row groups
        (..., G, R) or `x`.
    """
    if indices.dim() == 1:
        return x.index_select(-1, indices)
    if torch.compiler.is_compiling():
        is_whole = indices.numel() > _MOST_COPIED * x.shape[-1]
        each = indices.flatten()
        return x if is_whole else x.index_select(-1, each).unflatten(-1, indices.shape)
    columns = kept_columns(indices, x.shape[-1])
    return x if columns is None else _pick(x, columns)


def places_in(x_U: Tensor, indices: Tensor) -> Tensor:
    """Return where the columns of row groups are in what `select` returned for them: (G, R)."""
    if torch.compiler.is_compiling():
        return indices
    distinct, places = distinct_and_places(indices)
    return places if len(distinct) == x_U.shape[-1] else indices


def _pick(x: Tensor, columns: Tensor) -> Tensor:
    """Return x[..., columns] by the faster way for many columns.

    In half precision on CPUs that is column by column in memory: groups are then copied whole.
    """
    if x.itemsize == 2 and x.device.type == "cpu":
        return x.movedim(-1, 0)[columns].movedim(0, -1)
    return x.index_select(-1, columns)


def is_spread_out(indices: Tensor) -> bool:
    """Whether what is distinct is not known, as in a graph, whose sizes must not depend on it."""
    return indices.dim() == 2 and torch.compiler.is_compiling()


def spread(x_U: Tensor, indices: Tensor) -> Tensor:
    """Return (..., U) of `select` as (..., G R), one group's columns after the other's."""
    if indices.dim() == 1:
        return x_U
    return _pick(x_U, places_in(x_U, indices).flatten())


def by_group(x_NU: Tensor, indices: Tensor, joined: int = 1) -> Tensor:
    """Return (N, U) of `select`, or (N, G, R), as the (G, N, R) inputs of each group.

    Those of `joined` groups at a time beside each other: (G / joined, N, joined R).
    """
    x_NGR = spread(x_NU, indices) if x_NU.dim() == 2 else x_NU
    groups, rank = indices.shape
    return x_NGR.reshape(len(x_NU), groups // joined, joined * rank).transpose(0, 1)


def by_rows(y_NO: Tensor, groups: int) -> Tensor:
    """Return (N, O) as the (G, N, O/G) outputs of each group, a view."""
    num_tokens, num_rows = y_NO.shape
    return y_NO.view(num_tokens, groups, num_rows // groups).transpose(0, 1)


def joined_groups(update: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return an update of row groups as one of all rows: zeros where a group has no such column.

    Args:
        update: (O, R, ...).
        indices: (G, R); (R,) and its update are returned as they are.

    Returns:
        The (O, U, ...) update and the (U,) distinct columns.
    """
    if indices.dim() == 1:
        return update, indices
    distinct, places = distinct_and_places(indices)
    joined = update.new_zeros(len(update), len(distinct), *update.shape[2:])
    return joined.scatter_(1, row_index(places, update.shape), update), distinct


def linear_of_groups(x_GR: Tensor, update: Tensor, num_groups: int = 1) -> Tensor:
    """Apply an (O, R) update to the inputs of its groups, by plain operations.

    Args:
        x_GR: (..., G R), the inputs of one group after the other.
        update: (O, R).
        num_groups: G.

    Returns:
        (..., O).
    """
    if num_groups == 1:
        return F.linear(x_GR, update)
    x, groups = (t.unflatten(d, (num_groups, -1)) for t, d in ((x_GR, -1), (update, 0)))
    return torch.einsum("...gr,gor->...go", x, groups).flatten(-2)
