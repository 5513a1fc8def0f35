"""Where the columns of a checkpoint's tensor are in a server that joins tensors and splits them.

    trainer, checkpoint          server, tensor-parallel rank t of P
    q_proj, k_proj, v_proj       qkv_proj: this rank's rows of q, then of k, then of v
    gate_proj, up_proj           gate_up_proj: this rank's rows of gate, then of up
    o_proj, down_proj            row-parallel: columns t I/P to (t + 1) I/P
    embed_tokens, lm_head        rows of the vocabulary, filled up to a multiple of 64
    experts.gate_up_proj         experts.w13_weight, each half split by rows
    experts.down_proj            experts.w2_weight, split by columns

A column of the input stays one where rows are joined or split; where columns are split it belongs
to one rank. What a tensor is, row- or column-parallel or whole, is seen from its shape. The names
are vLLM's and SGLang's; others can be given.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pacatune.names import nearest
from pacatune.sync.message import ColumnSet

FUSIONS: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Module of a server -> the checkpoint's modules whose rows it joins, in order."""

# Parameters that a server calls otherwise, and of how many parts their rows are.
_EXPERTS = {
    "experts.gate_up_proj": ("w13_weight", 2),
    "experts.down_proj": ("w2_weight", 1),
}
_EXPERT_MODULES = ("experts", "experts.routed_experts")  # vLLM 0.32 has the second
_VOCABULARY_PADDING = 64


class Piece(NamedTuple):
    """Rows and columns of a checkpoint's tensor that a server's tensor holds in one place."""

    target: str
    """Name of the server's tensor."""
    source_rows: tuple[int, int] | None
    """First and last + 1 along the last dimension but one; None: the tensors are the same."""
    target_row: int
    """Where they begin in the server's tensor."""
    first_column: int
    """Which of the columns the server's tensor begins with."""
    num_columns: int
    """How many it has."""


def place(
    column_set: ColumnSet,
    targets: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    names: Sequence[str],
    *,
    fusions: Mapping[str, Sequence[str]],
    tp_rank: int,
    tp_size: int,
) -> list[Piece]:
    """Return where a server holds a tensor; empty if it has none of these names.

    Args:
        column_set: The columns.
        targets: Shapes of the server's tensors, of this rank's part.
        shapes: Shapes of the trainer's parameters beside the columns' own, by name.
        names: Under which the server may know the tensor.
        fusions: See `FUSIONS`.
        tp_rank: This rank.
        tp_size: Number of ranks.

    Raises:
        ValueError: If the server's tensor is neither the whole nor a part.
    """
    for name in names:
        if name in targets:
            return _split(column_set, name, targets[name], 1, tp_rank, tp_size)
    for name in names:
        if pieces := _fused(column_set, name, targets, shapes, fusions, tp_rank, tp_size):
            return pieces
        for ending, (other, num_parts) in _EXPERTS.items():
            for target in _experts_of(name, ending, other):
                if target in targets:
                    return _split(column_set, target, targets[target], num_parts, tp_rank, tp_size)
    return []


def _experts_of(name: str, ending: str, other: str) -> list[str]:
    """Return what a server may call the experts of a name: Mixtral's have a module of their own."""
    if not name.endswith(ending):
        return []
    owner = name.removesuffix(ending)
    owners = (owner, f"{owner.removesuffix('mlp.')}block_sparse_moe.")
    return [f"{prefix}{module}.{other}" for prefix in owners for module in _EXPERT_MODULES]


def _split(
    column_set: ColumnSet, target: str, shape: tuple[int, ...], num_parts: int, rank: int, size: int
) -> list[Piece]:
    """Return the pieces of a tensor that is split, or of each of its equal parts of rows."""
    if shape == column_set.shape and (size == 1 or num_parts == 1):
        return [Piece(target, None, 0, 0, column_set.shape[column_set.dim])]
    if len(shape) == len(column_set.shape) >= 2 and column_set.dim == len(shape) - 1:
        (*outer, rows, columns), (*own_outer, own_rows, own_columns) = column_set.shape, shape
        if outer == own_outer and own_columns == columns:
            if own_rows * size == rows and rows % (num_parts * size) == 0:
                part, own = rows // num_parts, own_rows // num_parts
                starts = [(n * part + rank * own, n * own) for n in range(num_parts)]
                return [Piece(target, (s, s + own), t, 0, columns) for s, t in starts]
            padded = -(-rows // _VOCABULARY_PADDING) * _VOCABULARY_PADDING
            if own_rows * size == padded and not outer:
                first = min(rank * own_rows, rows)
                last = min(first + own_rows, rows)
                return [Piece(target, (first, last), 0, 0, columns)]  # perhaps of no rows
        if outer == own_outer and own_rows == rows and own_columns * size == columns:
            return [Piece(target, (0, rows), 0, rank * own_columns, own_columns)]
    raise ValueError(
        f"{column_set.name!r} is {column_set.shape} in the trainer, and the server's {target!r} is "
        f"{shape}, which is neither that nor the part of rank {rank} of {size}; serve the same "
        "base, and give the server's `tp_rank` and `tp_size`."
    )


def _fused(
    column_set: ColumnSet,
    name: str,
    targets: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    fusions: Mapping[str, Sequence[str]],
    rank: int,
    size: int,
) -> list[Piece]:
    owner, _, last = name.rpartition(".")
    owner, _, module = owner.rpartition(".")
    beside, _, _ = column_set.parameter.rpartition(".")[0].rpartition(".")
    for joined, parts in fusions.items():
        target = ".".join(filter(None, (owner, joined, last)))
        if module not in parts or target not in targets:
            continue
        rows = []
        for part in parts:
            sibling = ".".join(filter(None, (beside, part, last)))
            shape = column_set.shape if part == module else shapes.get(sibling)
            if not shape:
                near = nearest(sibling, list(shapes), cutoff=0)
                raise ValueError(
                    f"the server joins {', '.join(parts)} in {target!r}, but the trainer has no "
                    f"{sibling!r}; the nearest is {near!r}. Give the server's own `fusions`."
                )
            rows.append(shape[0])
        own = targets[target]
        split = _rows_of_rank(rows, own[0], rank, size)
        if split is None or column_set.dim != 1 or own[1:] != column_set.shape[1:]:
            raise ValueError(
                f"the server's {target!r} is {own}, which does not hold the part of rank {rank} of "
                f"{size} of {', '.join(parts)} with {rows} rows of {column_set.shape[1:]}; "
                "serve the same base, and give the server's `tp_rank` and `tp_size`."
            )
        number = list(parts).index(module)
        start, count = split[number]
        before = sum(count for _, count in split[:number])
        return [Piece(target, (start, start + count), before, 0, column_set.shape[1])]
    return []


def _rows_of_rank(
    rows: Sequence[int], total: int, rank: int, size: int
) -> list[tuple[int, int]] | None:
    """Return first row and number of rows of each part that a rank has, None if they do not fit.

    With more ranks than heads of keys, several ranks have the same rows of keys and values.
    """
    if all(n % size == 0 for n in rows) and sum(rows) == total * size:
        return [(rank * n // size, n // size) for n in rows]
    if len(rows) != 3 or rows[0] % size or not rows[1] or rows[1] != rows[2]:
        return None
    queries = rows[0] // size
    keys, rest = divmod(total - queries, 2)
    if rest or keys <= 0 or rows[1] % keys or (size * keys) % rows[1]:
        return None
    first = rank // (size * keys // rows[1]) * keys
    return [(rank * queries, queries), (first, keys), (first, keys)]
