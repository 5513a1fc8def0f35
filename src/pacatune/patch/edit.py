"""An exact edit of a checkpoint: some columns of some tensors, as they were and as they are to be.

Nothing here knows files, models or PEFT.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pacatune.grid.columns import WeightColumns


@dataclass(frozen=True, kw_only=True, eq=False)
class Patch:
    """Columns of one checkpoint, before and after."""

    before: dict[str, WeightColumns] = field(repr=False)
    """The columns of the base, by the tensor's name."""
    after: dict[str, WeightColumns] = field(repr=False)
    """The same of the patched model. `before` and an adapter's deltas give them too, but whoever
    applies a patch need not know what an adapter is."""
    base: str = ""
    """What the base was called, for messages."""
    fingerprint: dict[str, dict[str, str]] = field(default_factory=dict, repr=False)
    """Hashes of some columns that the patch leaves alone, by the tensor's name and the column, as
    JSON has it."""
    adapter: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """The bytes of the files of the adapter it was made of, by name; empty if it is not kept."""

    @classmethod
    def of(cls, changes: Iterable[tuple[WeightColumns, Tensor]], **others: Any) -> "Patch":
        """Return the patch that writes new values over columns of a base; `others` as fields."""
        before, after = dict[str, WeightColumns](), dict[str, WeightColumns]()
        for columns, new in changes:
            before[columns.name] = columns
            after[columns.name] = replace(columns, values=new.contiguous())
        return cls(before=before, after=after, **others)

    def __post_init__(self) -> None:
        """Refuse a patch of nothing, of two dtypes, and hashes of no columns."""
        if not self.before:
            raise ValueError("`before` is empty; a patch changes at least one tensor.")
        for name, old in self.before.items():
            if self.after[name].dtype != old.dtype:
                raise ValueError(
                    f"{name!r} is {old.dtype} before and {self.after[name].dtype} after; both must "
                    "have the base's dtype."
                )
        for name, hashes in self.fingerprint.items():
            own = self.before.get(name)
            size = 0 if own is None else own.shape[own.dim]
            if own is None or not all(0 <= int(column) < size for column in hashes):
                raise ValueError(
                    f"`fingerprint` has columns of {name[:80]!r} that no tensor of the patch has; "
                    "make the patch again."
                )

    @property
    def num_columns(self) -> int:
        """Columns of all tensors."""
        return sum(columns.rank for columns in self.after.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the new columns: what an apply moves."""
        return sum(columns.values.nbytes for columns in self.after.values())

    @property
    def adapter_bytes(self) -> int:
        """Size of the adapter's files."""
        return sum(file.nbytes for file in self.adapter.values())

    def inverse(self) -> "Patch":
        """Return the patch that takes this one back; it has no adapter."""
        return replace(self, before=self.after, after=self.before, adapter={})

    def to(self, device: torch.device | str) -> "Patch":
        """Return the patch with its columns on a device: applying it there copies nothing over."""
        before, after = (
            {name: columns.to(device) for name, columns in part.items()}
            for part in (self.before, self.after)
        )
        return replace(self, before=before, after=after)


def stack(patches: Sequence[Patch]) -> Patch:
    """Join patches of one base, which change no column twice, into one patch.

    The result is exactly what applying one after the other gives, in any order. It carries no
    adapter.

    Raises:
        ValueError: If the patches are of different bases, or several change a column.
    """
    before, after = (
        {
            name: _join([columns[name] for columns in parts if name in columns])
            for name in dict.fromkeys(name for columns in parts for name in columns)
        }
        for parts in ([patch.before for patch in patches], [patch.after for patch in patches])
    )
    fingerprint: dict[str, dict[str, str]] = {}
    for name, columns in before.items():
        changed = set(columns.indices.tolist())
        joined = fingerprint.setdefault(name, {})
        for patch in patches:
            for column, value in patch.fingerprint.get(name, {}).items():
                if int(column) not in changed and joined.setdefault(column, value) != value:
                    raise ValueError(
                        f"the patches are of different bases: they disagree about column {column} "
                        f"of {name!r}, which none of them changes."
                    )
    base = next((patch.base for patch in patches if patch.base), "")
    return Patch(before=before, after=after, base=base, fingerprint=fingerprint)


def _join(parts: list[WeightColumns]) -> WeightColumns:
    """Return columns of one tensor as one."""
    first, *others = parts
    for other in others:
        if (other.shape, other.form, other.dim) != (first.shape, first.form, first.dim):
            raise ValueError(
                f"the patches cannot be joined: {first.name!r} is {first.shape} in {first.form} "
                f"for one, which changes it along dimension {first.dim}, and {other.shape} in "
                f"{other.form} for another, along {other.dim}. Take patches of one base; along "
                "other dimensions, apply them one after the other if no columns overlap, or "
                "`add_weighted_adapter` their adapters."
            )
    indices, order = torch.cat([part.indices for part in parts]).sort()
    if len(shared := indices[1:][indices[1:] == indices[:-1]]):
        raise ValueError(
            f"the patches overlap: several change columns of {first.name!r}, column "
            f"{int(shared[0])} for one. Join the adapters instead (`add_weighted_adapter`), or "
            "train them on columns of their own."
        )
    values = torch.cat([part.values for part in parts], first.dim)
    return replace(first, indices=indices, values=values.index_select(first.dim, order))
