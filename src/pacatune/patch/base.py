"""Whether a checkpoint is the one that a patch is for, and in which state.

The base's columns are in the patch, so those that it changes are compared bit for bit. That says
nothing of the others: a patch of one layer fits every fine-tune that froze this layer. So a patch
has hashes of up to 8 columns of each of its tensors that it leaves alone. Another patch of the same
base may have changed a few of those; another base has changed nearly all of them. Hashed are
numbers: the same codes with other scales are another base.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pacatune import pretrained
from pacatune.files.checkpoint import DTYPES, Checkpoint
from pacatune.files.journal import is_gguf
from pacatune.grid import is_packed
from pacatune.grid.columns import WeightColumns, columns_beside
from pacatune.grid.folder import PackedFolder
from pacatune.grid.gguf import GgufCheckpoint
from pacatune.ops.columns import bits
from pacatune.patch.edit import Patch
from pacatune.patch.memory import check_form, refuse_missing

_NUM_COLUMNS = 8
_HASH_DIGITS = 12
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model"]


def find_folder(name: str, *, option: str = "model") -> Path:
    """Return a model's folder or file: the one given, or the hub's, whose files are fetched."""
    source = pretrained.find_model(name, option=option)
    if Path(source).exists():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=_HUB_FILES))


def open_checkpoint(model: str | Path, *, half_edited: bool = False) -> Checkpoint:
    """Open a model folder, or a GGUF file; see `Checkpoint.open`."""
    if is_gguf(model):
        return GgufCheckpoint.open(model, half_edited=half_edited)
    kind = PackedFolder if is_packed(model) else Checkpoint
    return kind.open(model, half_edited=half_edited)


def patch_of(
    checkpoint: Checkpoint,
    changes: Iterable[tuple[WeightColumns, Tensor]],
    *,
    base: str,
    adapter: dict[str, Tensor] | None = None,
) -> Patch:
    """Return the patch of a checkpoint that writes new values over columns.

    Of each tensor some columns that are left alone, at equal distances, are hashed.
    """
    patch, fingerprint = Patch.of(changes, base=base, adapter=adapter or {}), {}
    for name, columns in patch.before.items():
        free = columns_beside(columns.indices, columns.shape[columns.dim], _NUM_COLUMNS)
        if len(columns.shape) > 1 and len(free):
            fingerprint[name] = _hashes(checkpoint, name, columns.dim, free)
    return replace(patch, fingerprint=fingerprint)


def _hashes(checkpoint: Checkpoint, name: str, dim: int, indices: Tensor) -> dict[str, str]:
    values = bits(checkpoint.values(name, dim, indices)).movedim(dim, 0).contiguous()
    return {
        str(column): hashlib.sha256(value.numpy().tobytes()).hexdigest()[:_HASH_DIGITS]
        for column, value in zip(indices.tolist(), values, strict=True)
    }


def check_tensors(checkpoint: Checkpoint, patch: Patch) -> None:
    """Refuse a checkpoint without the patch's tensors, or with others of these names."""
    for name, columns in patch.before.items():
        fix = f"{_other_base(checkpoint, patch)}."
        if (entry := checkpoint.entries.get(name)) is None:
            refuse_missing([name], checkpoint.entries, fix)
        form = entry.shape, DTYPES.get(entry.dtype, entry.dtype)
        check_form(name, form, (columns.shape, columns.form), fix)


def others_than(checkpoint: Checkpoint, expected: Mapping[str, WeightColumns]) -> list[str]:
    """Return the tensors that do not hold these columns, bit for bit."""
    return [
        name
        for name, columns in expected.items()
        if not torch.equal(
            bits(checkpoint.columns(name, columns.dim, columns.indices)), bits(columns.values)
        )
    ]


def check_base(
    checkpoint: Checkpoint, patch: Patch, *, allow_other_base: bool = False
) -> list[str]:
    """Refuse a checkpoint on which a patch would not be exact; it is only read.

    Args:
        checkpoint: The model folder.
        patch: Its columns before are what the folder must hold: the inverse one to revert.
        allow_other_base: Go on if most of a tensor's other columns differ from its base's.

    Returns:
        Notes for the user.

    Raises:
        ValueError: If the columns are others, or the base is another one.
    """
    check_tensors(checkpoint, patch)
    where = _other_base(checkpoint, patch)
    if differing := others_than(checkpoint, patch.before):
        if not others_than(checkpoint, patch.after):
            raise ValueError(
                f"{checkpoint.title} already holds the columns that would be written; there is "
                "nothing to do."
            )
        raise ValueError(
            f"{where}, or was changed: {len(differing)} of {len(patch.before)} tensors, first "
            f"{differing[0]!r}, hold other columns than the patch replaces. Choose the right base; "
            "if another patch that overlaps was applied later, revert that one first."
        )
    num_differing, num_compared = 0, 0
    for name, hashes in patch.fingerprint.items():
        indices = torch.tensor([*map(int, hashes)], dtype=torch.int64, device="cpu")
        here = _hashes(checkpoint, name, patch.before[name].dim, indices)
        num_others = sum(
            value != own for value, own in zip(hashes.values(), here.values(), strict=True)
        )
        if 2 * num_others > len(hashes) and not allow_other_base:
            raise ValueError(
                f"{where}: {num_others} of {len(hashes)} sampled columns of {name!r} beside the "
                "patch's differ, although those it changes are the same. Choose the right base, or "
                "pass `allow_other_base` (--allow_other_base)."
            )
        num_differing, num_compared = num_differing + num_others, num_compared + len(hashes)
    if not num_differing:
        return []
    return [
        f"{num_differing} of {num_compared} sampled columns beside the patch's differ from its "
        "base: another patch is applied, or it is another base."
    ]


def _other_base(checkpoint: Checkpoint, patch: Patch) -> str:
    called = f" ({patch.base!r})" if patch.base else ""
    return f"{checkpoint.title} is not the base that the patch is for{called}"
