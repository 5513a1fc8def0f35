"""An exact edit of a checkpoint: some columns of some tensors, as they are to be and as they were.

Nothing here knows files, models or PEFT. A column is one index along one dimension of a tensor:
dimension 1 of a linear layer's (O, I) weight, 0 of a Conv1D's (I, O), the last one of (E, O, I)
experts. Bits are compared and copied, never numbers: -0.0 is not 0.0, and NaN equals itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

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
class ColumnPlace:
    """Where some columns of one tensor are: those of an edit, or of a message."""

    name: str
    """Name of the tensor in the checkpoint, such as `model.layers.0.mlp.down_proj.weight`."""
    dim: int
    """Dimension of the tensor along which the columns are."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    indices: Tensor
    """(R,) int64, the columns in increasing order."""

    def check(self, where: str) -> None:
        """Refuse columns that a tensor of this shape cannot have; `where` begins the message."""
        dim, shape, indices = self.dim, self.shape, self.indices
        if not 0 <= dim < len(shape):
            raise ValueError(f"{where}: `dim` ({dim}) must be one of the dimensions of {shape}.")
        if indices.dim() != 1 or not len(indices):
            raise ValueError(f"{where}: `indices` must be (R,), got {tuple(indices.shape)}.")
        # On a GPU they came from a CPU (`to`), and to look at them would wait for it.
        if indices.device.type == "cpu":
            check_columns(indices, shape[dim], f"{where}: `indices`")

    @property
    def rank(self) -> int:
        """Number of columns."""
        return len(self.indices)

    @property
    def columns_shape(self) -> tuple[int, ...]:
        """`shape` with R in place of `shape[dim]`."""
        return (*self.shape[: self.dim], self.rank, *self.shape[self.dim + 1 :])


@dataclass(frozen=True, kw_only=True, eq=False)
class ColumnEdit(ColumnPlace):
    """Some columns of one tensor, before and after."""

    original: Tensor
    """The columns of the base: `shape` with R in place of `shape[dim]`, in the base's dtype."""
    new: Tensor
    """The columns of the patched tensor, in the same shape and dtype. `original` and an adapter's
    deltas give them too, but whoever applies a patch need not know what an adapter is."""
    grid: str = ""
    """Format of a quantised tensor, such as `Q4_1`: the columns are its codes then, (O, R) uint8.
    Empty: numbers."""
    scales: str = ""
    """Hash of some scales of a quantised tensor, with which codes are numbers."""

    def __post_init__(self) -> None:
        """Refuse parts that do not fit each other."""
        where = f"the edit of {self.name!r}"
        self.check(where)
        for part in ("original", "new"):
            if (shape := tuple(getattr(self, part).shape)) != self.columns_shape:
                raise ValueError(
                    f"{where}: `{part}` must be {self.columns_shape} to fit {self.rank} columns "
                    f"along dimension {self.dim} of {self.shape}, got {shape}."
                )
        if self.original.dtype != self.new.dtype:
            raise ValueError(
                f"{where}: `original` is {self.original.dtype} and `new` is {self.new.dtype}; "
                "both must have the base's dtype."
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
        if max(int(part.max()) for part in (self.original, self.new)) >= grid.num_codes:
            raise ValueError(f"{where}: {self.grid} has codes below {grid.num_codes} alone.")
        if not self.scales:
            raise ValueError(f"{where}: codes need `scales`, a hash of theirs; make it again.")

    @property
    def form(self) -> "str | torch.dtype":
        """Format of a quantised tensor, or dtype of another."""
        return self.grid or self.dtype

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor."""
        return self.original.dtype

    def inverse(self) -> "ColumnEdit":
        """Return the edit that takes this one back."""
        return replace(self, original=self.new, new=self.original)

    def to(self, device: torch.device | str) -> "ColumnEdit":
        """Return the same on a device."""
        parts = (self.indices, self.original, self.new)
        indices, original, new = (part.to(device) for part in parts)
        return replace(self, indices=indices, original=original, new=new)


def edit_of(name: str, dim: int, weight: Tensor, indices: Tensor, new: Tensor) -> ColumnEdit:
    """Return the edit that writes `new` over some columns of a tensor.

    Args:
        name: The tensor's name in the checkpoint.
        dim: Dimension of the columns.
        weight: The tensor of the base.
        indices: (R,) int64 columns, in increasing order.
        new: `weight`'s shape with R in place of that dimension.
    """
    return ColumnEdit(
        name=name,
        dim=dim,
        shape=tuple(weight.shape),
        indices=indices,
        original=read_bits(weight, dim, indices).contiguous(),
        new=new.contiguous(),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterPart:
    """The adapter that a patch was made of, so that it can be written again exactly."""

    config: str
    """Its adapter_config.json, to the letter."""
    sidecar: str | None
    """Its pacatune.json, if it has one."""
    tensors: dict[str, Tensor]
    """Its adapter_model.safetensors."""

    @property
    def num_bytes(self) -> int:
        """Size of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class Patch:
    """Edits of one checkpoint."""

    edits: dict[str, ColumnEdit] = field(repr=False)
    """By the tensor's name."""
    base: str = ""
    """What the base was called, for messages."""
    fingerprint: dict[str, dict[int, str]] = field(default_factory=dict, repr=False)
    """Hashes of some columns that the patch leaves alone, by the tensor's name and the column."""
    adapter: AdapterPart | None = field(default=None, repr=False)
    """The adapter it was made of, if it is kept."""

    def __post_init__(self) -> None:
        """Refuse a patch of nothing, edits under other names and hashes of no columns."""
        if not self.edits:
            raise ValueError("`edits` is empty; a patch changes at least one tensor.")
        for name, edit in self.edits.items():
            if name != edit.name:
                raise ValueError(f"`edits` has the edit of {edit.name!r} under the name {name!r}.")
        for name, hashes in self.fingerprint.items():
            own = self.edits.get(name)
            size = 0 if own is None else own.shape[own.dim]
            if own is None or not all(0 <= column < size for column in hashes):
                raise ValueError(
                    f"`fingerprint` has columns of {name[:80]!r} that no tensor of the patch has; "
                    "make the patch again."
                )

    @property
    def num_columns(self) -> int:
        """Columns of all tensors."""
        return sum(edit.rank for edit in self.edits.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the new columns: what an apply moves."""
        return sum(edit.new.nbytes for edit in self.edits.values())

    def inverse(self) -> "Patch":
        """Return the patch that takes this one back; it has no adapter."""
        inverse = {name: edit.inverse() for name, edit in self.edits.items()}
        return replace(self, edits=inverse, adapter=None)

    def to(self, device: torch.device | str) -> "Patch":
        """Return the patch with its columns on a device: applying it there copies nothing over."""
        return replace(self, edits={name: edit.to(device) for name, edit in self.edits.items()})


def stack(patches: Sequence[Patch]) -> Patch:
    """Join patches of one base, which change no column twice, into one patch.

    The result is exactly what applying one after the other gives, in any order. It carries no
    adapter.

    Raises:
        ValueError: If the patches are of different bases, or several change a column.
    """
    if not patches:
        raise ValueError("`patches` is empty; give at least one.")
    names = list(dict.fromkeys(name for patch in patches for name in patch.edits))
    edits = {
        name: _stack_edits([p.edits[name] for p in patches if name in p.edits]) for name in names
    }
    base = next((patch.base for patch in patches if patch.base), "")
    fingerprint: dict[str, dict[int, str]] = {}
    for name, edit in edits.items():
        changed = set(edit.indices.tolist())
        joined = fingerprint.setdefault(name, {})
        for patch in patches:
            for column, value in patch.fingerprint.get(name, {}).items():
                if column not in changed and joined.setdefault(column, value) != value:
                    raise ValueError(
                        f"the patches are of different bases: they disagree about column {column} "
                        f"of {name!r}, which none of them changes."
                    )
    return Patch(edits=edits, base=base, fingerprint=fingerprint)


def _stack_edits(edits: list[ColumnEdit]) -> ColumnEdit:
    first = edits[0]
    if len(edits) == 1:
        return first
    _refuse_other_forms(edits)
    indices, order = torch.cat([edit.indices for edit in edits]).sort()
    if len(shared := indices[1:][indices[1:] == indices[:-1]]):
        raise ValueError(
            f"the patches overlap: several change columns of {first.name!r}, column "
            f"{int(shared[0])} for one. Join the adapters instead (`add_weighted_adapter`), or "
            "train them on columns of their own."
        )
    original, new = (
        torch.cat(parts, first.dim).index_select(first.dim, order)
        for parts in zip(*((edit.original, edit.new) for edit in edits), strict=True)
    )
    return replace(first, indices=indices, original=original, new=new)


def _refuse_other_forms(edits: list[ColumnEdit]) -> None:
    first = edits[0]
    for other in edits[1:]:
        if (other.shape, other.form) != (first.shape, first.form):
            raise ValueError(
                f"the patches are of different bases: {first.name!r} is {first.shape} in "
                f"{first.form} for one and {other.shape} in {other.form} for another."
            )
        if other.scales != first.scales:
            raise ValueError(
                "the patches are of different bases: they were made with other scales of the codes "
                f"of {first.name!r}."
            )
        if other.dim != first.dim:
            raise ValueError(
                f"{first.name!r} is changed along dimension {first.dim} by one patch and along "
                f"{other.dim} by another; such patches cannot be joined: apply them one after the "
                "other if no columns overlap, or `add_weighted_adapter` their adapters."
            )
