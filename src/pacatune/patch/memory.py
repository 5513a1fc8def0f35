"""Apply a patch to a model in memory, and take it back, bit for bit."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pacatune.names import nearest
from pacatune.patch.edit import ColumnEdit, Patch, bits, column_bits, put_bits_


def apply(model: nn.Module | Mapping[str, Tensor], patch: Patch) -> None:
    """Write a patch's columns into a model's weights, all of them or none.

    The model's own tensors are changed in place; nothing is replaced, so graphs and engines that
    hold them see the patched model. Only the columns move, R/I of the bytes; keep the patch on the
    model's device (`Patch.to`) to move none between devices. Do not call this while another thread
    computes with the model.

    Args:
        model: A plain model, without adapters, or its tensors by their names.
        patch: For its checkpoint.

    Raises:
        ValueError: If a tensor is missing, has another shape, dtype or bits than the patch's base,
            is sharded, quantised or adapted, or if two of the names are one tensor. Nothing has
            been changed then.
    """
    _write(model, patch, "the base's columns, which the patch replaces")


def revert(model: nn.Module | Mapping[str, Tensor], patch: Patch) -> None:
    """Write the base's columns back where `apply` has written the patch's; see there.

    Raises:
        ValueError: As for `apply`, and if the model does not hold the patch's columns.
    """
    _write(model, patch.inverse(), "the patch's columns; is it applied?")


def find_name(name: str, known: Mapping[str, object], prefix: str = "") -> str | None:
    """Return the name under which a model knows a tensor of a checkpoint, None if it does not.

    A checkpoint of the bare model lacks the prefix (`model.`) that a model with a head has, and the
    other way round, as transformers loads both.
    """
    names = [name]
    if prefix:
        names += [f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]
    return next((one for one in names if one in known), None)


@torch.no_grad()
def _write(model: nn.Module | Mapping[str, Tensor], patch: Patch, expected: str) -> None:
    tensors, prefix = tensors_of(model)
    pairs = []
    for edit in patch.edits.values():
        weight = _find(tensors, edit, prefix)
        pairs.append((weight, edit.to(weight.device)))
    refuse_aliases(((edit.name, weight) for weight, edit in pairs), "the patch")
    _check_bits(pairs, expected)
    with Transaction() as writer:
        for weight, edit in pairs:
            writer.put(
                Place(weight, edit.dim, edit.indices, edit.row_dim), edit.new, before=edit.original
            )


class Place(NamedTuple):
    """Columns of one of a model's tensors, or of some rows of it."""

    tensor: Tensor
    dim: int
    indices: Tensor
    """(R,), or (G, R) of row groups."""
    row_dim: int = 0
    """Dimension that row groups divide."""
    span: tuple[int, int] | None = None
    """Where the rows begin, along the last dimension but one, and how many there are."""
    rows: Tensor | None = None
    """The row of each of `indices` by itself, where rows have different numbers of columns."""

    def view(self) -> Tensor:
        """Return the rows."""
        return self.tensor if self.span is None else self.tensor.narrow(-2, *self.span)

    def read(self) -> Tensor:
        """Return what is there."""
        view = self.view().detach()
        indices = self.indices.to(view.device)
        if self.rows is not None:
            return view[..., self.rows.to(view.device), indices]
        return column_bits(view, self.dim, indices, self.row_dim).view(view.dtype)

    def write(self, columns: Tensor) -> None:
        """Write columns, whose bits are kept."""
        device = self.tensor.device
        indices, columns = self.indices.to(device), columns.to(device)
        # The parameter itself: its version is counted, so a backward pass through what was computed
        # with the old columns raises instead of being wrong.
        with torch.inference_mode() if self.tensor.is_inference() else torch.no_grad():
            if self.rows is None:
                put_bits_(self.view(), self.dim, indices, columns, self.row_dim)
            else:
                bits(self.view())[..., self.rows.to(device), indices] = bits(columns)


class Transaction:
    """Writes columns into a model; a block that fails takes back what it has written."""

    def __init__(self) -> None:
        self._before: list[tuple[Place, Tensor]] = []

    def __enter__(self) -> "Transaction":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # an interrupt, an error of the device
            for place, columns in reversed(self._before):
                place.write(columns)

    def put(self, place: Place, columns: Tensor, *, before: Tensor | None = None) -> None:
        """Write columns; `before` is what is there, where that is known."""
        self._before.append((place, place.read() if before is None else before))
        place.write(columns)


def refuse_aliases(named: Iterable[tuple[str, Tensor]], who: str) -> None:
    """Refuse names of which two are one tensor; `who` changes them."""
    seen: dict[tuple[torch.device, int], str] = {}
    for name, tensor in named:
        if (other := seen.setdefault((tensor.device, tensor.data_ptr()), name)) != name:
            raise ValueError(
                f"{other!r} and {name!r} are one tensor in this model (tied), and {who} changes "
                "each for itself; untie them first."
            )


def tensors_of(model: nn.Module | Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], str]:
    """Return a model's tensors by their names, and the prefix of those that a head came before."""
    if not isinstance(model, nn.Module):
        return model, ""
    unwrap = getattr(model, "get_base_model", None)
    base: nn.Module = unwrap() if callable(unwrap) else model
    tensors: dict[str, Tensor] = dict(base.named_parameters(remove_duplicate=False))
    tensors |= dict(base.named_buffers(remove_duplicate=False))
    return tensors, str(getattr(base, "base_model_prefix", ""))


def _find(tensors: Mapping[str, Tensor], edit: ColumnEdit, prefix: str) -> Tensor:
    name = find_name(edit.name, tensors, prefix)
    if name is None:
        owner, _, last = edit.name.rpartition(".")
        if find_name(f"{owner}.base_layer.{last}", tensors, prefix) is not None:
            raise ValueError(
                f"{owner!r} has an adapter, which keeps columns of its own in the weight or beside "
                "it; unload the adapter first (`model.unload()`), or patch the plain model."
            )
        near = nearest(edit.name, list(tensors), cutoff=0)
        raise ValueError(
            f"the model has no tensor {edit.name!r}; the nearest is {near!r}. The patch is for "
            "another model, or for a checkpoint whose tensors this model holds in another form; "
            "apply it to the checkpoint then (`pacatune patch apply`)."
        )
    weight = tensors[name]
    if hasattr(weight, "placements"):
        raise ValueError(f"{name!r} is sharded over processes; patch it before it is sharded.")
    if tuple(weight.shape) != edit.shape or weight.dtype != edit.dtype:
        raise ValueError(
            f"{name!r} is {tuple(weight.shape)} in {weight.dtype}, but the patch is for "
            f"{edit.shape} in {edit.dtype}; load the model in that dtype, not quantised."
        )
    if weight.is_meta:
        raise ValueError(f"{name!r} is on the meta device, without values; load the model first.")
    return weight


def _check_bits(pairs: list[tuple[Tensor, ColumnEdit]], expected: str) -> None:
    """Compare all tensors before any answer is waited for: a GPU is asked once per device."""
    verdicts: dict[torch.device, list[tuple[ColumnEdit, Tensor]]] = {}
    for weight, edit in pairs:
        is_equal = (edit.bits_of(weight.detach()) == bits(edit.original)).all()
        verdicts.setdefault(weight.device, []).append((edit, is_equal))
    for answers in verdicts.values():
        is_equal = torch.stack([one for _, one in answers]).cpu()
        wrong = [edit.name for (edit, _), ok in zip(answers, is_equal, strict=True) if not ok]
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(pairs)} tensors, first {wrong[0]!r}, do not hold {expected}."
                " The model is of another base, or was changed; nothing was written."
            )
