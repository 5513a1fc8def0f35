"""From an adapter to a patch of its base, and back."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pacatune.adapters.base import base_name, empty_base, load_base
from pacatune.adapters.folder import CONFIG_NAME, SIDECAR_NAME, Adapter, read_adapter
from pacatune.adapters.loading import check_base, check_shapes
from pacatune.adapters.target import (
    BaseWeight,
    map_weights_,
    stored_names,
    target_of_module,
)
from pacatune.files.checkpoint import DTYPES, Checkpoint
from pacatune.files.folder import staged_folder
from pacatune.files.plain import find_file
from pacatune.format.options import format_quantization
from pacatune.format.tensors import TENSORS_NAME, plain_name
from pacatune.grid import is_packed
from pacatune.grid.columns import WeightColumns, put_bits_
from pacatune.names import find_name, names_of
from pacatune.ops.columns import bits
from pacatune.patch.base import find_folder, patch_of
from pacatune.patch.difference import changed_columns
from pacatune.patch.edit import Patch
from pacatune.patch.packed import make_packed, open_packed, rounding_note
from pacatune.tuner.compat import as_saved, tied_weights

_Change = tuple[WeightColumns, Tensor]
"""Columns of a checkpoint, and what they become."""
_FILES = (CONFIG_NAME, SIDECAR_NAME, TENSORS_NAME)
_BY_MERGE = (
    "Make the patch of the merged model instead: `pacatune merge --model BASE --adapter ADAPTER "
    "--output MERGED`, then `pacatune patch diff --model BASE --with MERGED --output PATCH`."
)


def make(
    model: str | Path | None,
    adapter: str | Path,
    *,
    with_adapter: bool = True,
    allow_other_base: bool = False,
) -> tuple[Patch, list[str]]:
    """Make the patch that turns an adapter's base into what `merge` writes, bit for bit.

    The base's files are read where columns change and nowhere else; the model is not loaded, except
    where transformers holds a tensor in another form than the checkpoint (experts, mostly).

    Args:
        model: Folder or hub id of the base, or its GGUF file, whose codes change; None takes the
            one that the adapter names.
        adapter: Folder or hub id of a PaCA adapter.
        with_adapter: Keep the adapter's own tensors, which `to_adapter` needs: in 16 bits the
            columns are rounded, so the update cannot be read off them.
        allow_other_base: Go on although the base is not the one the adapter was trained on.

    Returns:
        The patch, and notes for the user.

    Raises:
        FileNotFoundError: If base or adapter are missing.
        ValueError: If the adapter is damaged, belongs to another base, is not PaCA's, was trained
            on a quantised base or trains more than columns, or the base ties a changed tensor.
    """
    checked = read_adapter(adapter)
    if (quantization := checked.config.base_quantization) is not None:
        raise ValueError(
            f"{checked.folder} was trained on a base quantised as "
            f"{format_quantization(quantization)!r}, whose weights are not those of the "
            "checkpoint. `pacatune merge --base original` writes the checkpoint with the trained "
            "columns; `pacatune patch diff` makes a patch of that."
        )
    name = base_name(None if model is None else str(model), checked.config)
    part = _files(checked.folder) if with_adapter else {}
    if is_packed(name):
        plain = load_base(name, task_type=checked.config.task_type, packed=None)
        notes = check_base(checked, plain, allow_other_base=allow_other_base)
        patch, rounding = make_packed(plain, open_packed(name), checked)
        return replace(patch, adapter=part), [*notes, rounding_note(rounding)]
    checkpoint = Checkpoint.open(find_folder(name))
    base: Any = empty_base(name, task_type=checked.config.task_type)
    check_shapes(checked.modules, base, source=str(checked.folder))
    base, changes = _changes(name, base, checkpoint, checked)
    notes = check_base(checked, base, allow_other_base=allow_other_base)
    if not with_adapter:
        notes.append("the patch is without its adapter (--no_adapter), which it cannot give back.")
    # The path of somebody's folder is their own.
    short = Path(name).resolve().name if Path(name).is_dir() else name
    return patch_of(checkpoint, changes, base=short, adapter=part), notes


def _changes(
    name: str, base: Any, checkpoint: Checkpoint, checked: Adapter
) -> tuple[Any, list[_Change]]:
    """Return what changes in a checkpoint, and the base with the weights that it changes."""
    targets = {module: target_of_module(base, module) for module in checked.modules}
    parameters = {module: target.full_name(module) for module, target in targets.items()}
    _refuse_tied(base, set(parameters.values()))
    _refuse_extra(checked, checkpoint, base.base_model_prefix)
    names = stored_names(base, targets, checkpoint)
    dtypes = {checkpoint.entries[stored].dtype for stored in names.values()}
    if getattr(base.config, "quantization_config", None) or not dtypes <= DTYPES.keys():
        raise ValueError(
            f"base model {name!r} is saved quantised: its numbers are packed, and columns of them "
            "cannot be exchanged. Use the original base that is not quantised."
        )
    if map_weights_(base, checkpoint, names) == len(targets):
        return base, [_change(names[module], targets[module], checked, module) for module in names]
    base, changes = load_base(name, task_type=checked.config.task_type), list[_Change]()
    for module, parameter in parameters.items():
        target = target_of_module(base, module)
        change = _change(parameter, target, checked, module)
        changes += _converted(base, checkpoint, target.weight, *change)
    return base, changes


def to_adapter(patch: Patch, output: str | Path) -> Path:
    """Write the adapter that a patch was made of: its files, byte for byte.

    Args:
        patch: With its adapter.
        output: Folder to write, missing or empty.

    Raises:
        FileExistsError: If `output` is in use.
        ValueError: If the patch is without its adapter, or that is damaged.
    """
    if not patch.adapter:
        raise ValueError(
            "the patch is without the adapter it was made of; make it again without --no_adapter."
        )
    output = Path(output)
    with staged_folder(output, patch.adapter_bytes) as staging:
        for name in patch.adapter.keys() & {*_FILES}:
            (staging / name).write_bytes(bits(patch.adapter[name]).numpy().tobytes())
        read_adapter(staging)  # a patch may come from a stranger
    return output


def _refuse_extra(adapter: Adapter, checkpoint: Checkpoint, prefix: str) -> None:
    for key, tensor in adapter.extra.items():
        name = find_name(names_of(plain_name(key), prefix), checkpoint.entries)
        # PEFT saves embeddings that are adapted, or beside others that are, as they are.
        if name is None or not _is_stored(checkpoint, name, tensor):
            raise ValueError(
                f"{adapter.folder} also trains what are no columns, first {key!r}. {_BY_MERGE}"
            )


def _refuse_tied(base: Any, parameters: set[str]) -> None:
    for target, source in tied_weights(base).items():
        if touched := sorted(parameters & {target, source}):
            raise ValueError(
                f"the adapter changes {touched[0]!r}, and the base ties {target!r} to {source!r}: "
                "its checkpoint has one tensor for both, and a patch would change both. Merge the "
                "adapter instead (`pacatune merge`), which unties them."
            )


def _change(name: str, target: BaseWeight, adapter: Adapter, module: str) -> _Change:
    """Return what an adapter makes of one weight's columns; the bits are those of a merge."""
    weight, layout = target.weight, target.layout
    if layout.why_no_columns is not None:
        raise ValueError(
            f"{adapter.folder}: module {module!r} is {layout.why_no_columns}, whose trained "
            f"channels are no columns of its kernel. {_BY_MERGE}"
        )
    indices = adapter.modules[module].indices
    new = target.adapted(target.columns(indices), adapter, module)
    if not new.isfinite().all():
        raise ValueError(
            f"{adapter.folder}: module {module!r} has columns that are not finite in "
            f"{weight.dtype}; use a base of wider range, or an earlier checkpoint of the adapter."
        )
    return WeightColumns.of(name, layout.weight_dim, weight, indices), new


def _converted(
    base: Any, checkpoint: Checkpoint, weight: Tensor, columns: WeightColumns, new: Tensor
) -> Iterator[_Change]:
    """Yield what changes in a checkpoint's tensors of a weight that transformers has otherwise."""
    patched = weight.clone()
    put_bits_(patched, columns.dim, columns.indices, new)
    before, after = (as_saved(base, {columns.name: tensor}) for tensor in (weight, patched))
    for name, tensor in before.items():
        if not _is_stored(checkpoint, name, tensor):
            raise ValueError(
                f"{checkpoint.title} does not hold {columns.name!r} as transformers would save it, "
                f"as {name!r} in {tensor.dtype}. {_BY_MERGE}"
            )
        if (change := changed_columns(name, tensor, after[name])) is not None:
            yield change


def _is_stored(checkpoint: Checkpoint, name: str, tensor: Tensor) -> bool:
    entry = checkpoint.entries.get(name)
    if entry is None or entry.shape != tuple(tensor.shape):
        return False
    stored = checkpoint.tensor(name)
    return stored.dtype == tensor.dtype and torch.equal(bits(stored), bits(tensor.contiguous()))


def _files(folder: Path) -> dict[str, Tensor]:
    """Return the bytes of an adapter's files."""
    contents = {}
    for name in _FILES:
        if (folder / name).exists():
            data = bytearray(find_file(folder, name).read_bytes())
            contents[name] = torch.frombuffer(data, dtype=torch.uint8)
    return contents
