"""Apply a patch to a model in memory, and take it back, bit for bit."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from pacatune.names import nearest
from pacatune.patch.edit import ColumnEdit, Patch, bits, column_bits, put_bits_

__all__ = ["apply", "find_name", "mode_of", "revert", "tensors_of"]


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
    _refuse_aliases(pairs)
    _check_bits(pairs, expected)
    done = 0
    try:
        for weight, edit in pairs:
            done += 1
            _put(weight, edit, edit.new)
    except BaseException:  # an interrupt, an error of the device
        for weight, edit in pairs[:done]:
            _put(weight, edit, edit.original)
        raise


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


def _refuse_aliases(pairs: list[tuple[Tensor, ColumnEdit]]) -> None:
    seen: dict[tuple[torch.device, int], str] = {}
    for weight, edit in pairs:
        place = (weight.device, weight.data_ptr())
        if (other := seen.setdefault(place, edit.name)) != edit.name:
            raise ValueError(
                f"{other!r} and {edit.name!r} are one tensor in this model (tied), and the patch "
                "changes each for itself; untie them first."
            )


def _check_bits(pairs: list[tuple[Tensor, ColumnEdit]], expected: str) -> None:
    """Compare all tensors before any answer is waited for: a GPU is asked once per device."""
    verdicts: dict[torch.device, list[tuple[ColumnEdit, Tensor]]] = {}
    for weight, edit in pairs:
        found = column_bits(weight.detach(), edit.dim, edit.indices, edit.row_dim)
        is_equal = (found == bits(edit.original)).all()
        verdicts.setdefault(weight.device, []).append((edit, is_equal))
    for answers in verdicts.values():
        is_equal = torch.stack([one for _, one in answers]).cpu()
        wrong = [edit.name for (edit, _), ok in zip(answers, is_equal, strict=True) if not ok]
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(pairs)} tensors, first {wrong[0]!r}, do not hold {expected}."
                " The model is of another base, or was changed; nothing was written."
            )


def _put(weight: Tensor, edit: ColumnEdit, columns: Tensor) -> None:
    # The parameter itself: its version is counted, so a backward pass through what was computed
    # with the old columns raises instead of being wrong.
    with mode_of(weight)():
        put_bits_(weight, edit.dim, edit.indices, columns, edit.row_dim)


def mode_of(weight: Tensor) -> Callable[[], AbstractContextManager[None]]:
    """Return the mode in which a weight may be written in place."""
    return torch.inference_mode if weight.is_inference() else torch.no_grad
