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

from torch import Tensor

from pacatune.names import nearest
from pacatune.patch.memory import Place
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

    columns: ColumnSet
    target: str
    """Name of the server's tensor,"""
    shape: tuple[int, ...]
    """and its shape."""
    rows: tuple[int, int] | None
    """First and last + 1 along the last dimension but one; None: the tensors are the same."""
    target_row: int
    """Where they begin in the server's tensor."""
    chosen: Tensor
    """Which of the columns are here,"""
    indices: Tensor
    """and where, along their dimension of the server's tensor."""

    @property
    def is_empty(self) -> bool:
        """Whether this rank has none of the columns, or none of the rows."""
        return not len(self.chosen) or (self.rows is not None and self.rows[0] == self.rows[1])

    def place(self, tensors: Mapping[str, Tensor]) -> Place:
        """Return where that is, given the server's tensors."""
        tensor = tensors[self.target]
        if self.rows is not None:
            tensor = tensor.narrow(-2, self.target_row, self.rows[1] - self.rows[0])
        return Place(tensor, self.columns.dim, self.indices)

    def part_of(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return what belongs here, given all columns by name."""
        part, dim = values[self.columns.name], self.columns.dim
        if self.rows is not None:
            part = part.narrow(-2, self.rows[0], self.rows[1] - self.rows[0])
        if len(self.chosen) < part.shape[dim]:
            part = part.index_select(dim, self.chosen.to(part.device))
        return part


class Server(NamedTuple):
    """What a process of a server holds."""

    tensors: Mapping[str, Tensor]
    """By name; of a tensor that is split this rank's part."""
    fusions: Mapping[str, Sequence[str]]
    """See `FUSIONS`."""
    rank: int
    size: int
    """Number of ranks."""

    def pieces(
        self, columns: ColumnSet, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
    ) -> list[Piece]:
        """Return where the server holds a tensor; empty if it has none of these names.

        Args:
            columns: The columns.
            names: Under which the server may know the tensor.
            shapes: Shapes of the trainer's parameters, by name.

        Raises:
            ValueError: If the server's tensor is neither the whole nor a part.
        """
        for name in names:
            if name in self.tensors:
                return self._split(columns, name, 1)
        for name in names:
            if (joined := self._joined(columns, name, shapes)) is not None:
                return [joined]
            for ending, (other, num_parts) in _EXPERTS.items():
                for target in _experts_of(name, ending, other):
                    if target in self.tensors:
                        return self._split(columns, target, num_parts)
        return []

    def _piece(
        self,
        columns: ColumnSet,
        target: str,
        rows: tuple[int, int] | None,
        target_row: int = 0,
        first_column: int = 0,
    ) -> Piece:
        tensor, indices = self.tensors[target], columns.indices - first_column
        chosen = ((indices >= 0) & (indices < tensor.shape[columns.dim])).nonzero().flatten()
        places = (part.to(tensor.device) for part in (chosen, indices[chosen]))
        return Piece(columns, target, tuple(tensor.shape), rows, target_row, *places)

    def _split(self, columns: ColumnSet, target: str, num_parts: int) -> list[Piece]:
        """Return the pieces of a tensor that is split, or of each of its equal parts of rows."""
        shape, size = tuple(self.tensors[target].shape), self.size
        if shape == columns.shape and (size == 1 or num_parts == 1):
            return [self._piece(columns, target, None)]
        if len(shape) == len(columns.shape) >= 2 and columns.dim == len(shape) - 1:
            (*outer, rows, width), (*own_outer, own_rows, own_width) = columns.shape, shape
            if outer == own_outer and own_width == width:
                if own_rows * size == rows and rows % (num_parts * size) == 0:
                    part, own = rows // num_parts, own_rows // num_parts
                    starts = [(n * part + self.rank * own, n * own) for n in range(num_parts)]
                    return [self._piece(columns, target, (s, s + own), t) for s, t in starts]
                padded = -(-rows // _VOCABULARY_PADDING) * _VOCABULARY_PADDING
                if own_rows * size == padded and not outer:
                    first = min(self.rank * own_rows, rows)
                    last = min(first + own_rows, rows)  # perhaps of no rows
                    return [self._piece(columns, target, (first, last))]
            if outer == own_outer and own_rows == rows and own_width * size == width:
                return [self._piece(columns, target, (0, rows), 0, self.rank * own_width)]
        raise self._misfit(columns, target, f"{columns.shape}")

    def _misfit(self, columns: ColumnSet, target: str, needed: str) -> ValueError:
        return ValueError(
            f"{columns.name!r} needs {needed} in the server, whose {target!r} is "
            f"{tuple(self.tensors[target].shape)}: neither that nor the part of rank {self.rank} "
            f"of {self.size}; serve the same base, and give the server's `tp_rank` and `tp_size`."
        )

    def _joined(
        self, columns: ColumnSet, name: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> Piece | None:
        """Return the rows of a tensor in one that joins it with others; None if there is none."""
        owner, module, last = _split_name(name)
        own_owner, _, _ = _split_name(columns.parameter)
        for joined, parts in self.fusions.items():
            target = ".".join(filter(None, (owner, joined, last)))
            if module not in parts or target not in self.tensors:
                continue
            rows = []
            for part in parts:
                sibling = ".".join(filter(None, (own_owner, part, last)))
                shape = columns.shape if part == module else shapes.get(sibling)
                if not shape:
                    near = nearest(sibling, list(shapes), cutoff=0)
                    raise ValueError(
                        f"the server joins {', '.join(parts)} in {target!r}, but the trainer has "
                        f"no {sibling!r}; the nearest is {near!r}. Give the server's own `fusions`."
                    )
                rows.append(shape[0])
            own = tuple(self.tensors[target].shape)
            split = _rows_of_rank(rows, own[0], self.rank, self.size)
            if split is None or columns.dim != 1 or own[1:] != columns.shape[1:]:
                joint = f"{rows} rows of {', '.join(parts)}, of {columns.shape[1:]},"
                raise self._misfit(columns, target, joint)
            number = list(parts).index(module)
            start, count = split[number]
            before = sum(count for _, count in split[:number])
            return self._piece(columns, target, (start, start + count), before)
        return None


def _split_name(name: str) -> tuple[str, str, str]:
    """Return owner, module and parameter of a tensor's name."""
    owner, _, last = name.rpartition(".")
    owner, _, module = owner.rpartition(".")
    return owner, module, last


def _experts_of(name: str, ending: str, other: str) -> list[str]:
    """Return what a server may call the experts of a name: Mixtral's have a module of their own."""
    if not name.endswith(ending):
        return []
    owner = name.removesuffix(ending)
    owners = (owner, f"{owner.removesuffix('mlp.')}block_sparse_moe.")
    return [f"{prefix}{module}.{other}" for prefix in owners for module in _EXPERT_MODULES]


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
