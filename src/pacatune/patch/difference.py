"""What two checkpoints differ in."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pacatune.files.checkpoint import DTYPES, Checkpoint
from pacatune.files.journal import is_gguf
from pacatune.ops.columns import bits
from pacatune.patch.base import fingerprint
from pacatune.patch.edit import ColumnEdit, Patch, edit_of

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
    edits: dict[str, ColumnEdit] = {}
    changed: dict[str, float] = {}
    forms, other_forms = (
        {name: (entry.shape, entry.dtype) for name, entry in folder.entries.items()}
        for folder in (first, second)
    )
    shared = [name for name in forms if name in other_forms]
    other_form = [name for name in shared if forms[name] != other_forms[name]]
    whole = []
    for name in (name for name in shared if name not in other_form):
        before, after = first.tensor(name), second.tensor(name)
        if (change := changed_columns(before, after)) is None:
            continue
        dim, columns = change
        changed[name] = len(columns) / before.shape[dim] if before.dim() else 1.0
        # Of a vector, such as a bias, each element is a column: it is small, so all may change.
        is_few = before.dim() == 1 or changed[name] <= _MAX_SHARE
        if is_few and first.entries[name].dtype in DTYPES:
            edits[name] = edit_of(name, dim, before, columns, after.index_select(dim, columns))
        else:
            whole.append(name)
    only_a, only_b = (
        sorted(forms.keys() - other_forms.keys()),
        sorted(other_forms.keys() - forms.keys()),
    )
    patch = None
    if edits and not (only_a or only_b or other_form or whole):
        base = Path(a).resolve().name
        patch = Patch(edits=edits, base=base, fingerprint=fingerprint(first, edits))
    return Difference(
        patch=patch,
        num_equal=len(shared) - len(changed) - len(other_form),
        changed=dict(sorted(changed.items(), key=lambda item: -item[1])),
        only_a=only_a,
        only_b=only_b,
        other_form=other_form,
        whole=whole,
    )


def changed_columns(before: Tensor, after: Tensor) -> tuple[int, Tensor] | None:
    """Return the dimension along which the fewest columns differ, and these; None: equal bits.

    Fewest by share: 8 of 4096 columns are fewer than 1 of 16 rows.
    """
    if before.dim() == 0:
        before, after = before.view(1), after.view(1)
    differs = bits(before) != bits(after)
    if not differs.any():
        return None
    dims = range(before.dim())
    others = [[other for other in dims if other != dim] for dim in dims]
    changed = [differs.any(rest) if rest else differs for rest in others]
    shares = [float(flags.float().mean()) for flags in changed]
    dim = shares.index(min(shares))
    return dim, changed[dim].nonzero()[:, 0]
