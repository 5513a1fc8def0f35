"""What two checkpoints differ in."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pacatune.files.checkpoint import DTYPES, Checkpoint
from pacatune.files.journal import is_gguf
from pacatune.grid.columns import WeightColumns, read_bits
from pacatune.ops.columns import bits
from pacatune.patch.base import patch_of
from pacatune.patch.edit import Patch

_MAX_SHARE = 0.5
"""A patch has changed columns twice, before and after: from half of a tensor on, that is larger."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What two checkpoints differ in."""

    patch: Patch | None
    """Turns the first into the second; None where they are equal or differ in more than columns."""
    num_equal: int
    """Tensors of the same bits."""
    changed: dict[str, float]
    """Tensor -> share of its columns that differ, along the dimension where that is smallest."""
    only_a: list[str]
    """Tensors of the first alone."""
    only_b: list[str]
    """Tensors of the second alone."""
    other_form: list[str]
    """Tensors of other shapes or dtypes."""
    whole: list[str]
    """Tensors that differ in more than half of their columns, or are packed numbers."""

    def refusal(self) -> str | None:
        """Say why there is no patch; None if there is one."""
        if self.patch is not None:
            return None
        for names, what in (
            (self.only_a, "are in the first alone"),
            (self.only_b, "are in the second alone"),
            (self.other_form, "have another shape or dtype"),
            (self.whole, "differ in more than half of their columns"),
        ):
            if names:
                return f"{len(names)} tensors {what}, first {names[0]!r}"
        return "they are equal"


def diff(a: str | Path, b: str | Path) -> Difference:
    """Compare two model folders, tensor by tensor and bit by bit.

    The folders are read once, tensor by tensor. Their other files are not compared.

    Raises:
        FileNotFoundError: If one is missing, or a file of it.
        ValueError: If a file is damaged.
    """
    for path in (a, b):
        if is_gguf(path):
            raise ValueError(f"{path} is a GGUF file; model folders are compared.")
    first, second = Checkpoint.open(a), Checkpoint.open(b)
    changes: list[tuple[WeightColumns, Tensor]] = []
    changed: dict[str, float] = {}
    num_equal, other_form, whole = 0, list[str](), list[str]()
    for name in (name for name in first.entries if name in second.entries):
        entry, other = first.entries[name], second.entries[name]
        if (entry.shape, entry.dtype) != (other.shape, other.dtype):
            other_form.append(name)
        elif (change := changed_columns(name, first.tensor(name), second.tensor(name))) is None:
            num_equal += 1
        else:
            columns = change[0]
            changed[name] = columns.rank / columns.shape[columns.dim]
            # Of a vector, such as a bias, each element is a column: it is small, so all may change.
            is_few = len(entry.shape) == 1 or changed[name] <= _MAX_SHARE
            if is_few and entry.dtype in DTYPES:
                changes.append(change)
            else:
                whole.append(name)
    only_a, only_b = (
        sorted(own.entries.keys() - beside.entries.keys())
        for own, beside in ((first, second), (second, first))
    )
    patch = None
    if changes and not (only_a or only_b or other_form or whole):
        patch = patch_of(first, changes, base=Path(a).resolve().name)
    return Difference(
        patch=patch,
        num_equal=num_equal,
        changed=dict(sorted(changed.items(), key=lambda item: -item[1])),
        only_a=only_a,
        only_b=only_b,
        other_form=other_form,
        whole=whole,
    )


def changed_columns(
    name: str, before: Tensor, after: Tensor
) -> tuple[WeightColumns, Tensor] | None:
    """Return the columns that differ, along the dimension with the fewest; None: equal bits.

    Fewest by share: 8 of 4096 columns are fewer than 1 of 16 rows. A number is a vector of one.
    """
    before, after = torch.atleast_1d(before, after)
    differs = bits(before) != bits(after)
    if not differs.any():
        return None
    dims = range(before.dim())
    others = [[other for other in dims if other != dim] for dim in dims]
    changed = [differs.any(rest) if rest else differs for rest in others]
    shares = [float(flags.float().mean()) for flags in changed]
    dim = shares.index(min(shares))
    indices = changed[dim].nonzero()[:, 0]
    return WeightColumns.of(name, dim, before, indices), read_bits(after, dim, indices)
