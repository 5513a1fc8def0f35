"""What every PaCA tensor must fulfil, wherever it comes from; torch only.

An adapter stores two tensors for each adapted module: `<module>.paca_delta` (O, R) and
`<module>.paca_indices` (R,), sorted and unique, or (G, R) with a line for each of G row groups
(docs/method.md). The deltas of convolutions have the kernel's dimensions after these, those of
expert parameters the number of experts before.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pacatune.precision import FLOATS, dtype_name

DELTA = "paca_delta"
INDICES = "paca_indices"
PEFT_PREFIX = "base_model.model."
TENSORS_NAME = "adapter_model.safetensors"


class ColumnUpdate(NamedTuple):
    """The two tensors that adapt one module."""

    delta: Tensor
    """(O, R), (O, R, *kernel) or (E, O, R) update of the trained columns, before scaling."""
    indices: Tensor
    """(R,) int64, the trained columns in increasing order; (G, R) those of each row group."""


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
    return {module: ColumnUpdate(found[DELTA], found[INDICES]) for module, found in parts.items()}


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
        if not update.indices.is_meta:
            _check_order(update.indices, where)


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
    if indices.dtype != torch.int64:
        raise ValueError(
            f"{where}: `{INDICES}` has dtype {indices.dtype}; it must be torch.int64. "
            "Convert it with `.long()` and save the adapter again."
        )
    # (O, R, *kernel) of layers, (E, O, R) of experts: which, only the base model knows.
    ranks = {delta.shape[1], delta.shape[2] if delta.ndim == 3 else delta.shape[1]}
    is_grouped = indices.ndim == 2 and len(indices) > 1
    if not (indices.ndim == 1 or is_grouped) or indices.shape[-1] not in ranks:
        listed = " or ".join(f"({rank},)" for rank in sorted(ranks))
        raise ValueError(
            f"{where}: `{INDICES}` has shape {tuple(indices.shape)}; it must be {listed}, one "
            f"entry for each column of `{DELTA}`, which has shape {tuple(delta.shape)}, or such a "
            "line for each of `groups`."
        )
    rows = {delta.shape[0], delta.shape[1] if delta.ndim == 3 else delta.shape[0]}
    if is_grouped and all(number % len(indices) for number in rows):
        raise ValueError(
            f"{where}: `{INDICES}` has {len(indices)} lines, one for each of `groups`, which do "
            f"not divide the rows of `{DELTA}`, which has shape {tuple(delta.shape)}."
        )


def _check_order(indices: Tensor, where: str) -> None:
    lines = indices.reshape(-1, indices.shape[-1])
    before = torch.nn.functional.pad(lines, (1, 0), value=-1)[:, :-1]
    wrong = (lines <= before).nonzero().tolist()
    if wrong:
        line, place = wrong[0]
        raise ValueError(
            f"{where}: `{INDICES}` holds {int(lines[line, place])} at position {place}; column "
            "numbers must be sorted and unique, from 0 on. Sort them and reorder the columns of "
            f"`{DELTA}` alike."
        )
