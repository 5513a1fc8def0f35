"""Whether a checkpoint is the one that a patch is for, and in which state.

The original columns are in the patch, so the columns that it changes are compared bit for bit. That
says nothing of the others: a patch of one layer fits every fine-tune that froze this layer. So a
patch has hashes of up to 8 columns of each of its tensors that it leaves alone. Another patch of
the same base may have changed a few of those; another base has changed nearly all of them. Codes
are numbers with their scales, which no patch changes: some of these are hashed, too.
"""

import hashlib
from pathlib import Path

import torch

from pacatune import pretrained
from pacatune.files.checkpoint import DTYPES, Checkpoint
from pacatune.files.journal import is_gguf
from pacatune.grid import is_packed
from pacatune.grid.checkpoint import PackedCheckpoint
from pacatune.grid.folder import PackedFolder
from pacatune.grid.gguf import GgufCheckpoint
from pacatune.ops.columns import bits
from pacatune.patch.edit import ColumnEdit, Patch
from pacatune.patch.memory import check_form, refuse_missing

_NUM_COLUMNS = 8
_HASH_DIGITS = 12
_ALLOW = "Choose the right base, or pass `allow_other_base` (--allow_other_base)."
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


def fingerprint(checkpoint: Checkpoint, edits: dict[str, ColumnEdit]) -> dict[str, dict[int, str]]:
    """Hash some columns of each tensor, at equal distances, of those that its edit leaves alone."""
    result = {}
    for name, edit in edits.items():
        is_free = torch.ones(edit.shape[edit.dim], dtype=torch.bool, device="cpu")
        is_free[edit.indices] = False
        free = is_free.nonzero()[:, 0]
        chosen = free[:: max(1, -(-len(free) // _NUM_COLUMNS))]
        if len(edit.shape) > 1 and len(chosen):
            result[name] = _hashes(checkpoint, name, edit.dim, chosen.tolist())
    return result


def _hashes(checkpoint: Checkpoint, name: str, dim: int, columns: list[int]) -> dict[int, str]:
    indices = torch.tensor(columns, dtype=torch.int64, device="cpu")
    values = bits(checkpoint.columns(name, dim, indices)).movedim(dim, 0).contiguous()
    return {
        column: hashlib.sha256(value.numpy().tobytes()).hexdigest()[:_HASH_DIGITS]
        for column, value in zip(columns, values, strict=True)
    }


def check_tensors(checkpoint: Checkpoint, patch: Patch) -> None:
    """Refuse a checkpoint without the patch's tensors, or with others of these names."""
    for name, edit in patch.edits.items():
        fix = f"{_other_base(checkpoint, patch)}."
        if (entry := checkpoint.entries.get(name)) is None:
            refuse_missing([name], checkpoint.entries, fix)
        form = entry.shape, DTYPES.get(entry.dtype, entry.dtype)
        check_form(name, form, (edit.shape, edit.form), fix)


def holds(checkpoint: Checkpoint, patch: Patch) -> list[str]:
    """Return the tensors whose columns are not those that the patch starts from, `original`."""
    return [
        name
        for name, edit in patch.edits.items()
        if not torch.equal(
            bits(checkpoint.columns(name, edit.dim, edit.indices)), bits(edit.original)
        )
    ]


def check_base(
    checkpoint: Checkpoint, patch: Patch, *, allow_other_base: bool = False
) -> list[str]:
    """Refuse a checkpoint on which a patch would not be exact; it is only read.

    Args:
        checkpoint: The model folder.
        patch: Its `original` is what the folder must hold: the inverse one to revert.
        allow_other_base: Go on if other columns than the patch's differ from its base.

    Returns:
        Notes for the user.

    Raises:
        ValueError: If the columns are others, or the base is another one.
    """
    check_tensors(checkpoint, patch)
    where = _other_base(checkpoint, patch)
    if differing := holds(checkpoint, patch):
        if not holds(checkpoint, patch.inverse()):
            raise ValueError(
                f"{checkpoint.title} already holds the columns that would be written; there is "
                "nothing to do."
            )
        raise ValueError(
            f"{where}, or was changed: {len(differing)} of {len(patch.edits)} tensors, first "
            f"{differing[0]!r}, hold other columns than the patch replaces. Choose the right base; "
            "if another patch that overlaps was applied later, revert that one first."
        )
    notes = _other_scales(checkpoint, patch)
    if notes and not allow_other_base:
        raise ValueError(f"{notes[0]} {_ALLOW}")
    num_equal, num_compared = 0, 0
    for name, hashes in patch.fingerprint.items():
        hashes_here = _hashes(checkpoint, name, patch.edits[name].dim, [*hashes])
        num_compared += len(hashes)
        num_equal += sum(hashes_here[column] == value for column, value in hashes.items())
    sampled = f"{num_compared - num_equal} of {num_compared} sampled columns beside the patch's"
    if 2 * num_equal < num_compared and not allow_other_base:
        raise ValueError(
            f"{where}: {sampled} differ, although those it changes are the same. {_ALLOW}"
        )
    if num_equal < num_compared:
        notes.append(
            f"{sampled} differ from its base: another patch is applied, or it is another base."
        )
    return notes


def _other_scales(checkpoint: Checkpoint, patch: Patch) -> list[str]:
    """Return a note if codes are other numbers here than in the patch's base."""
    for name, edit in patch.edits.items():
        packed = checkpoint if isinstance(checkpoint, PackedCheckpoint) else None
        if edit.grid and (packed is None or packed.scales_print(name) != edit.scales):
            return [
                f"{_other_base(checkpoint, patch)}: it holds the codes of {name!r} with other "
                "scales than the patch was made with, by which they are other numbers."
            ]
    return []


def _other_base(checkpoint: Checkpoint, patch: Patch) -> str:
    called = f" ({patch.base!r})" if patch.base else ""
    return f"{checkpoint.title} is not the base that the patch is for{called}"
