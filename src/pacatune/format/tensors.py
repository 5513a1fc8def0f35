"""What every PaCA tensor must fulfil, wherever it comes from; torch only.

An adapter stores two tensors for each adapted module: `<module>.paca_delta` (O, R) and
`<module>.paca_indices` (C,), sorted and unique; with `channels` `<module>.paca_mix` (R, C) as well,
and otherwise C is R. The deltas of convolutions have the kernel's dimensions after these, deltas
and mixes of expert parameters the number of experts before.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pacatune.ops.columns import check_columns, mixed
from pacatune.ops.whole import is_whole
from pacatune.precision import FLOATS, dtype_name

DELTA = "paca_delta"
MIX = "paca_mix"
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
    """(O, R), (O, R, *kernel) or (E, O, R) update of the trained columns, before scaling.

    Of experts (O, R, E) once an adapter has been read.
    """
    indices: Tensor
    """(C,) int64, the trained columns, in increasing order."""
    mix: Tensor | None = None
    """(R, C), (R, C, *kernel) or (E, R, C); None where each column has its own update."""

    @property
    def rank(self) -> int:
        """R."""
        return len(self.indices) if self.mix is None else self.delta.shape[1]

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of `dense()`, of which nothing is formed."""
        if self.mix is None:
            return tuple(self.delta.shape)
        if self.mix.ndim == self.delta.ndim == 3:
            return len(self.delta), self.mix.shape[2], len(self.mix)
        return len(self.delta), *self.mix.shape[1:]

    def dense(self) -> Tensor:
        """Return the update of all columns, (O, C), (O, C, *kernel) or, of experts, (O, C, E)."""
        if self.mix is None:
            return self.delta
        if self.mix.ndim == self.delta.ndim == 3:
            return mixed(self.delta.permute(2, 0, 1), self.mix).permute(1, 2, 0)
        return mixed(self.delta, self.mix)


# Modules around a base model's own: of PEFT and torch, and those of ours.
_AROUND = ("base_layer", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def plain_name(name: str) -> str:
    """Return what the base model calls a module or parameter of an adapted or wrapped one."""
    parts = name.removeprefix(PEFT_PREFIX).split(".")
    return ".".join(part for part in parts if part not in _AROUND)


def split_tensor_name(name: str) -> tuple[str, str] | None:
    """Split a name, such as (`layers.0.q_proj`, `paca_delta`); None if it is not PaCA's."""
    module, _, kind = name.rpartition(".")
    if kind not in (DELTA, INDICES, MIX):
        return None
    return module.removeprefix(PEFT_PREFIX), kind


def group_tensors(tensors: Mapping[str, Tensor], *, source: str) -> dict[str, ColumnUpdate]:
    """Bring each module's tensors together; those of other kinds are passed over."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.endswith(_ROW_GROUPS):
            raise ValueError(f"{source}: {name!r} {ROW_GROUPS_LEFT}")
        if (split := split_tensor_name(name)) is not None:
            module, kind = split
            parts.setdefault(module, {})[kind] = tensor
    for module, by_kind in parts.items():
        for kind in (DELTA, INDICES):
            if kind not in by_kind:
                raise ValueError(
                    f"{source}: module {module!r} has `{min(by_kind)}` but no `{kind}`; each "
                    "adapted module needs both. The file is incomplete: save the adapter again."
                )
    return {
        module: ColumnUpdate(by_kind[DELTA], by_kind[INDICES], by_kind.get(MIX))
        for module, by_kind in parts.items()
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
        for kind, tensor in ((DELTA, update.delta), (MIX, update.mix)):
            if tensor is not None and not tensor.is_meta:
                check_finite({f"{module}.{kind}": tensor}, source=source)
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
    delta, indices, mix = update
    for kind, tensor in ((DELTA, delta), (MIX, mix)):
        if tensor is not None and dtype_name(tensor.dtype) not in FLOATS:
            raise ValueError(
                f"{where}: `{kind}` has dtype {tensor.dtype}; it must be one of "
                f"{', '.join(FLOATS)}."
            )
    if delta.ndim < 2 or 0 in delta.shape:
        raise ValueError(
            f"{where}: `{DELTA}` has shape {tuple(delta.shape)}; it must be (out_features, rank), "
            "both at least 1, with the kernel's sizes after them or the number of experts before."
        )
    if mix is not None:
        # Of layers (R, C, *kernel) beside (O, R), of experts (E, R, C) beside (E, O, R).
        parts = mix.shape[delta.ndim - 2 :]
        is_fit = delta.ndim <= 3 and mix.ndim >= delta.ndim and parts[0] == delta.shape[-1]
        is_fit = is_fit and mix.shape[: delta.ndim - 2] == delta.shape[: delta.ndim - 2]
        if not is_fit or indices.shape != parts[1:2]:
            raise ValueError(
                f"{where}: `{MIX}` has shape {tuple(mix.shape)}; it must be (rank, columns) to fit "
                f"`{DELTA}` {tuple(delta.shape)} and `{INDICES}` {tuple(indices.shape)}, with the "
                "kernel's sizes after them or the number of experts before."
            )
        return
    # (O, R, *kernel) of layers, (E, O, R) of experts: which, only the base model knows.
    sizes = [delta.shape[:2]] + ([delta.shape[1:]] if delta.ndim == 3 else [])
    if indices.ndim != 1 or all(columns != len(indices) for _, columns in sizes):
        listed = " or ".join(f"({columns},)" for columns in sorted({size[1] for size in sizes}))
        raise ValueError(
            f"{where}: `{INDICES}` has shape {tuple(indices.shape)}; it must be {listed}, one "
            f"entry for each column of `{DELTA}`, which has shape {tuple(delta.shape)}."
        )
