"""What every PaCA tensor must fulfil, wherever it comes from; torch only.

An adapter stores two tensors for each adapted module: `<module>.paca_delta` (O, R) and
`<module>.paca_indices` (R,), sorted and unique. With a pattern (docs/method.md) these are (U,), and
`<module>.paca_places` (G, R) says which of them each of G row groups trains. The deltas of
convolutions have the kernel's dimensions after these, those of expert parameters the number of
experts before.

Earlier versions had no places, and indices (G, R): those of each row group.
"""

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor

from pacatune.ops.columns import check_columns
from pacatune.ops.pattern import columns_of, divide, expand, form_of
from pacatune.ops.whole import is_whole
from pacatune.precision import FLOATS, dtype_name

DELTA = "paca_delta"
INDICES = "paca_indices"
PLACES = "paca_places"
PEFT_PREFIX = "base_model.model."
TENSORS_NAME = "adapter_model.safetensors"


class ColumnUpdate(NamedTuple):
    """The tensors that adapt one module."""

    delta: Tensor
    """(O, R), (O, R, *kernel) or (E, O, R) update of the trained columns, before scaling."""
    indices: Tensor
    """(U,) int64, the columns of which anything is trained, in increasing order."""
    places: Tensor | None = None
    """(G, R) int64, which of these each row group trains; None: all do, U = R."""

    @property
    def num_groups(self) -> int:
        """G."""
        return form_of(self.indices, self.places)[0]

    @property
    def rank(self) -> int:
        """R."""
        return form_of(self.indices, self.places)[1]

    def columns(self) -> Tensor:
        """Return the columns of each row, (R,), or (G, R) of row groups."""
        return columns_of(self.indices, self.places)

    def whole(self) -> "ColumnUpdate":
        """Return the same without a pattern: zeros where a row does not train a column.

        Of a delta with the columns in its second dimension.
        """
        return ColumnUpdate(expand(self.delta, self.places, len(self.indices)), self.indices)


def with_places(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors in today's form."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] == INDICES and tensor.ndim == 2 and not tensor.is_meta:
            result[name], places = divide(tensor)
            result[name.removesuffix(INDICES) + PLACES] = cast(Tensor, places)
    return result


# Modules around a base model's own: of PEFT and torch, and those of ours.
_AROUND = ("base_layer", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def plain_name(name: str) -> str:
    """Return what the base model calls a module or parameter of an adapted or wrapped one."""
    parts = name.removeprefix(PEFT_PREFIX).split(".")
    return ".".join(part for part in parts if part not in _AROUND)


def split_tensor_name(name: str) -> tuple[str, str] | None:
    """Split a name, such as (`layers.0.q_proj`, `paca_delta`); None if it is not PaCA's."""
    module, _, kind = name.rpartition(".")
    if kind not in (DELTA, INDICES, PLACES):
        return None
    return module.removeprefix(PEFT_PREFIX), kind


def group_tensors(tensors: Mapping[str, Tensor], *, source: str) -> dict[str, ColumnUpdate]:
    """Pair each module's delta with its indices; tensors of other kinds are passed over."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if (split := split_tensor_name(name)) is not None:
            module, kind = split
            parts.setdefault(module, {})[kind] = tensor
    for module, found in parts.items():
        for kind, other in ((DELTA, INDICES), (INDICES, DELTA)):
            if kind not in found:
                raise ValueError(
                    f"{source}: module {module!r} has `{other}` but no `{kind}`; each adapted "
                    "module needs both. The file is incomplete: save the adapter again."
                )
    return {
        module: ColumnUpdate(found[DELTA], found[INDICES], found.get(PLACES))
        for module, found in parts.items()
    }


def check_tensors(tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Refuse PaCA tensors that no training run can have written.

    Checks what the tensors alone can show: pairs, dtypes, shapes, finite deltas, indices that
    are non-negative, unique and increasing. Tensors of other kinds (biases, `modules_to_save`)
    are passed over, and the values of tensors on the meta device are not looked at. Names are
    those of an adapter file, with PEFT's prefix or without; errors begin with `source`.
    """
    for module, update in group_tensors(tensors, source=source).items():
        where = f"{source}: module {module!r}"
        _check_layout(update, where)
        if not update.delta.is_meta:
            check_finite({f"{module}.{DELTA}": update.delta}, source=source)
        check_columns(update.indices, None, f"{where}: `{INDICES}`")
        if update.places is not None:
            check_columns(update.places, len(update.indices), f"{where}: `{PLACES}`")


def check_finite(tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Refuse NaN and infinity in an adapter's tensors of any kind."""
    for name, tensor in tensors.items():
        is_small = tensor.is_floating_point() and tensor.itemsize == 1
        try:
            is_finite = bool((tensor.float() if is_small else tensor).isfinite().all())
        except NotImplementedError:  # packed in 4 bits, as no training saves them
            is_finite = False
        if not is_finite:
            raise ValueError(
                f"{source}: tensor {name!r} holds values that are not finite. Training diverged or "
                "the file is damaged: use an earlier checkpoint."
            )


def is_equal(tensor: Tensor, own: Tensor) -> bool:
    """Whether a tensor of a file has the values of a base model's own weight."""
    is_known = is_whole(own, tensor.dim()) and own.shape == tensor.shape
    return is_known and torch.equal(tensor.to(own), own.detach())


def _check_layout(update: ColumnUpdate, where: str) -> None:
    delta, indices, places = update
    if dtype_name(delta.dtype) not in FLOATS:
        raise ValueError(
            f"{where}: `{DELTA}` has dtype {delta.dtype}; it must be one of {', '.join(FLOATS)}."
        )
    if delta.ndim < 2 or 0 in delta.shape:
        raise ValueError(
            f"{where}: `{DELTA}` has shape {tuple(delta.shape)}; it must be (out_features, rank), "
            "both at least 1, with the kernel's sizes after them or the number of experts before."
        )
    # (O, R, *kernel) of layers, (E, O, R) of experts: which, only the base model knows.
    sizes = [delta.shape[:2]] + ([delta.shape[1:]] if delta.ndim == 3 else [])
    if places is not None and (places.ndim != 2 or len(places) < 2):
        raise ValueError(
            f"{where}: `{PLACES}` has shape {tuple(places.shape)}; it must have a line for each of "
            "`groups`, at least 2."
        )
    groups, rank = form_of(indices, places)
    if indices.ndim != 1 or all(columns != rank for _, columns in sizes):
        kind, shape = (INDICES, indices.shape) if places is None else (PLACES, places.shape)
        listed = " or ".join(f"({columns},)" for columns in sorted({size[1] for size in sizes}))
        raise ValueError(
            f"{where}: `{kind}` has shape {tuple(shape)}; it must be {listed}, one entry for each "
            f"column of `{DELTA}`, which has shape {tuple(delta.shape)}, or such a line for each "
            "of `groups`."
        )
    if all(rows % groups for rows, columns in sizes if columns == rank):
        raise ValueError(
            f"{where}: `{PLACES}` has {groups} lines, one for each of `groups`, which do not "
            f"divide the rows of `{DELTA}`, which has shape {tuple(delta.shape)}."
        )
