"""What every PaCA tensor must fulfil, wherever it comes from; torch only.

An adapter stores two tensors for each adapted module: `<module>.paca_delta` (O, R) and
`<module>.paca_indices` (R,), sorted and unique. The deltas of convolutions have the kernel's
dimensions after these, those of expert parameters the number of experts before.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pacatune.ops.columns import check_columns
from pacatune.ops.whole import is_whole
from pacatune.precision import FLOATS, dtype_name

DELTA = "paca_delta"
INDICES = "paca_indices"
PEFT_PREFIX = "base_model.model."
TENSORS_NAME = "adapter_model.safetensors"

_ROW_GROUPS = ".paca_places"
ROW_GROUPS_LEFT = (
    "is of an adapter of row groups, which left. Check out commit d5ebc774 of pacatune, and merge "
    "or export it there."
)


class ColumnUpdate(NamedTuple):
    """The tensors that adapt one module."""

    delta: Tensor
    """(O, R), (O, R, *kernel) or (E, O, R) update of the trained columns, before scaling."""
    indices: Tensor
    """(R,) int64, the trained columns, in increasing order."""

    @property
    def rank(self) -> int:
        """R."""
        return len(self.indices)


# Modules around a base model's own: of PEFT and torch, and those of ours.
_AROUND = ("base_layer", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def plain_name(name: str) -> str:
    """Return what the base model calls a module or parameter of an adapted or wrapped one."""
    parts = name.removeprefix(PEFT_PREFIX).split(".")
    return ".".join(part for part in parts if part not in _AROUND)


def split_tensor_name(name: str) -> tuple[str, str] | None:
    """Split a name, such as (`layers.0.q_proj`, `paca_delta`); None if it is not PaCA's."""
    module, _, kind = name.rpartition(".")
    if kind not in (DELTA, INDICES):
        return None
    return module.removeprefix(PEFT_PREFIX), kind


def group_tensors(tensors: Mapping[str, Tensor], *, source: str) -> dict[str, ColumnUpdate]:
    """Pair each module's delta with its indices; tensors of other kinds are passed over."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.endswith(_ROW_GROUPS):
            raise ValueError(f"{source}: {name!r} {ROW_GROUPS_LEFT}")
        if (split := split_tensor_name(name)) is not None:
            module, kind = split
            parts.setdefault(module, {})[kind] = tensor
    for module, by_kind in parts.items():
        for kind, other in ((DELTA, INDICES), (INDICES, DELTA)):
            if kind not in by_kind:
                raise ValueError(
                    f"{source}: module {module!r} has `{other}` but no `{kind}`; each adapted "
                    "module needs both. The file is incomplete: save the adapter again."
                )
    return {
        module: ColumnUpdate(by_kind[DELTA], by_kind[INDICES]) for module, by_kind in parts.items()
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
    delta, indices = update
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
    if indices.ndim != 1 or all(columns != len(indices) for _, columns in sizes):
        listed = " or ".join(f"({columns},)" for columns in sorted({size[1] for size in sizes}))
        raise ValueError(
            f"{where}: `{INDICES}` has shape {tuple(indices.shape)}; it must be {listed}, one "
            f"entry for each column of `{DELTA}`, which has shape {tuple(delta.shape)}."
        )
