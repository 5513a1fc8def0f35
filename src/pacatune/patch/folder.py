"""Apply a patch to a model folder: into a new folder, or in place, so that a kill loses nothing.

In place, a loader sees the base, an error, or the patched model, and never a mixture:

1. The journal, a patch file of what is about to be written, is put into the folder.
2. Each file that changes is renamed (`model.safetensors.patching`): who loads now misses a file.
3. The columns are written and synced; headers, sizes and all other bytes stay.
4. The files get their names back, then the journal is removed.

Whoever finds a journal puts the columns back that were there before and ends with 4. Writing them
again does no harm, so it does not matter where the process was killed, nor how often.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from pacatune.files.checkpoint import Checkpoint, writable
from pacatune.files.folder import (
    check_output,
    check_room,
    explained_failure,
    remove_unfinished,
    staged_folder,
    sync,
    whole_file,
)
from pacatune.files.journal import (
    JOURNAL_NAME,
    PARKED_SUFFIX,
    file_path,
    folder_of,
    is_gguf,
    journal_of,
)
from pacatune.files.owned_folder import alone_in
from pacatune.files.plain import find_file
from pacatune.grid.columns import WeightColumns
from pacatune.patch.base import check_base, check_tensors, open_checkpoint, others_than
from pacatune.patch.edit import Patch
from pacatune.patch.file import load, refuse_existing, save

_PAGE_BYTES = 4096
# Weights in other formats, which a patch does not change: a copy of them would be the base's.
_OTHER_WEIGHTS = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".data")


@dataclass(frozen=True, kw_only=True)
class FolderResult:
    """What was written."""

    folder: Path
    """The model folder."""
    page_bytes: int
    """Bytes of the 4 KiB pages that the columns lie in: what a disk writes at least."""
    checkpoint_bytes: int
    """Size of all files with tensors."""
    notes: list[str] = field(default_factory=list)
    """What the user should know."""


def apply_to_folder(
    model: str | Path,
    patch: Patch,
    output: str | Path,
    *,
    revert: bool = False,
    allow_other_base: bool = False,
    check: Callable[[Path], object] | None = None,
) -> FolderResult:
    """Write a patched copy of a model folder, a plain one that needs nothing of ours, or of a GGUF.

    Files that are not weights come along; hidden ones, weights in other formats and safetensors
    that are not the model's do not. What was written is read back before the folder gets its name.

    Args:
        model: The folder, or GGUF file, to patch; it is only read.
        patch: What to write.
        output: Folder to write, missing or empty; of a GGUF a new .gguf file.
        revert: Take the patch back instead of applying it.
        allow_other_base: As for `check_base`.
        check: Gets the path of what was written, which comes to nothing if this raises.

    Raises:
        FileExistsError: If `output` is in use.
        FileNotFoundError: If a file of the model is missing.
        ValueError: If the patch does not fit, the folder is damaged, or the disk is full.
    """
    output, wanted = Path(output), patch.inverse() if revert else patch
    check_new(model, output)
    checkpoint = open_checkpoint(model)
    notes = check_base(checkpoint, wanted, allow_other_base=allow_other_base)
    result = _result(output, checkpoint, wanted, notes)
    with _copied(checkpoint, output, notes) as copy:
        copied = open_checkpoint(copy)
        for name, columns in _by_file(copied, wanted).items():
            _write(copied.folder / name, copied, columns)
        if wrong := others_than(open_checkpoint(copy), wanted.after):
            raise ValueError(
                f"{wrong[0]!r} was not written as it should be; nothing was left behind. Is the "
                "disk damaged?"
            )
        if check is not None:
            check(copy)
    return result


def check_new(model: str | Path, output: Path) -> None:
    """Refuse a name for a changed copy of a model that is taken, or that no GGUF has."""
    if not is_gguf(model):
        check_output(output, num_bytes=0)
        return
    if not is_gguf(output):
        raise ValueError(f"`output` ({output}) must end in .gguf, as the model does.")
    refuse_existing(output)


@contextmanager
def _copied(checkpoint: Checkpoint, output: Path, notes: list[str]) -> Iterator[Path]:
    """Give a copy of a model that gets its name when the block succeeds; note what it lacks."""
    if not is_gguf(output):
        with staged_folder(output, checkpoint.num_bytes) as staging:
            notes += _copy(checkpoint, staging)
            yield staging
        return
    (name,) = checkpoint.files
    check_room(output.parent, checkpoint.num_bytes)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with explained_failure(output), whole_file(output, is_new=True) as copy:
        shutil.copyfile(file_path(checkpoint.folder, name), copy)
        yield copy


def apply_in_place(
    folder: str | Path, patch: Patch, *, revert: bool = False, allow_other_base: bool = False
) -> FolderResult:
    """Patch a model folder itself: nothing but the columns is written.

    An earlier call that was killed is rolled back first. Do not load from the folder meanwhile; who
    tries finds a file missing. A process that has mapped the files (as loaders do until all weights
    are read) sees the new columns in them.

    Args:
        folder: The model folder, or the GGUF file.
        patch: What to write.
        revert: Take the patch back instead of applying it.
        allow_other_base: As for `check_base`.

    Raises:
        FileNotFoundError: If a file of the model is missing.
        ValueError: If the patch does not fit, a file is a link or has several names, another
            process is at work in the folder, or the disk is full. The folder is as before then.
    """
    model, wanted = Path(folder), patch.inverse() if revert else patch
    folder = folder_of(model)
    with alone_in(folder):
        notes = _roll(model, finish=False)
        checkpoint = open_checkpoint(model)
        check_tensors(checkpoint, wanted)
        result = _result(model, checkpoint, wanted, notes)
        if notes and not others_than(checkpoint, wanted.after):
            return result  # that was all that was asked for
        result.notes.extend(check_base(checkpoint, wanted, allow_other_base=allow_other_base))
        files = _by_file(checkpoint, wanted)
        _refuse_links(folder, files)
        # The journal; and the pages, which file systems that share blocks write to new places.
        check_room(folder, 2 * wanted.num_bytes + result.page_bytes)
        for name in files:
            with writable(folder / name):  # or rolling back would fail as well
                pass
        with explained_failure(model):
            try:
                save(replace(wanted, fingerprint={}, adapter={}), journal_of(model))
                sync(folder)
                _edit(model, checkpoint, files)
            except BaseException as error:  # a full disk, an interrupt: back to what it was
                try:
                    _roll(model, finish=False)
                except Exception as second:
                    raise ValueError(
                        f"patching {model} failed ({error!r}), and so did rolling it back "
                        f"({second}). Its journal is kept: mend the cause, such as a full or "
                        f"damaged disk, then run `pacatune patch recover --model {model}`."
                    ) from error
                raise
    return result


def recover(folder: str | Path, *, finish: bool = False) -> list[str]:
    """Bring a folder in order whose patching in place was killed.

    Args:
        folder: The model folder.
        finish: Complete what was begun instead of rolling it back.

    Returns:
        Notes of what was done; empty if there was nothing to do.

    Raises:
        ValueError: If another process is at work there, or the journal is damaged.
    """
    with alone_in(folder_of(Path(folder))):
        return _roll(Path(folder), finish=finish)


def _by_file(checkpoint: Checkpoint, patch: Patch) -> dict[str, list[WeightColumns]]:
    """Return what is to be written into each file."""
    files: dict[str, list[WeightColumns]] = {}
    for name, columns in patch.after.items():
        files.setdefault(checkpoint.entries[name].file, []).append(columns)
    return files


def _write(path: Path, checkpoint: Checkpoint, changes: list[WeightColumns]) -> None:
    with writable(path) as memory:
        for new in changes:
            checkpoint.put_columns_(memory, new.name, new.dim, new.indices, new.values)


def _edit(model: Path, checkpoint: Checkpoint, files: dict[str, list[WeightColumns]]) -> None:
    folder = folder_of(model)
    for name in files:
        if not (parked := folder / f"{name}{PARKED_SUFFIX}").exists():
            (folder / name).rename(parked)
    sync(folder)
    for name, changes in files.items():
        _write(file_path(folder, name), checkpoint, changes)
    for name in files:
        file_path(folder, name).rename(folder / name)
    sync(folder)
    journal_of(model).unlink()
    sync(folder)


def _roll(model: Path, *, finish: bool) -> list[str]:
    """End what a journal says was begun."""
    folder, journal = folder_of(model), journal_of(model)
    remove_unfinished(journal)
    if journal.is_symlink():
        raise ValueError(
            f"{journal} is a link, which pacatune never leaves there as its journal; see where it "
            "leads, and remove it."
        )
    if not journal.exists():
        return []
    patch = load(journal) if finish else load(journal).inverse()
    checkpoint = open_checkpoint(model, half_edited=True)
    check_tensors(checkpoint, patch)
    files = _by_file(checkpoint, patch)
    _refuse_links(folder, files)
    _refuse_others(folder, checkpoint, patch)
    _edit(model, checkpoint, files)
    done = "completed" if finish else "rolled back"
    return [f"{model}: patching in place was interrupted earlier; it is {done}."]


def _refuse_others(folder: Path, checkpoint: Checkpoint, patch: Patch) -> None:
    """Refuse files that were put into the folder after the interruption: they are not ours.

    A file under its own name was not begun or is finished, so its columns are all of one kind.
    """
    neither = {*others_than(checkpoint, patch.before)} & {*others_than(checkpoint, patch.after)}
    for name, changes in _by_file(checkpoint, patch).items():
        parked = folder / f"{name}{PARKED_SUFFIX}"
        if parked.exists():
            if os.path.lexists(folder / name):
                raise ValueError(
                    f"{folder} has both {name} and {parked.name}: one was put there after patching "
                    f"in place was interrupted. Move it away, or remove {parked.name} to keep it."
                )
        elif not neither.isdisjoint(columns.name for columns in changes):
            raise ValueError(
                f"{folder / name} was replaced after patching in place was interrupted: it has the "
                f"columns of neither model. Put the old one back, or remove {JOURNAL_NAME} to keep "
                "it."
            )


def _refuse_links(folder: Path, files: Iterable[str]) -> None:
    for name in files:
        path = file_path(folder, name)
        if path.is_symlink() or path.stat().st_nlink > 1:
            raise ValueError(
                f"{path} is a link, or has several names: others that use the file would see the "
                "patch too. Write a new folder (--output), or put a copy of the file in its place."
            )


def _copy(checkpoint: Checkpoint, staging: Path) -> list[str]:
    """Copy a model folder; return a note on what was left out."""
    root, left_out = checkpoint.folder.resolve(), []
    for path in sorted(root.rglob("*")):
        inner = path.relative_to(root)
        if any(part.startswith(".") for part in inner.parts) or not path.is_file():
            continue
        source = find_file(root, str(inner))
        is_models = str(inner) in checkpoint.files
        if not is_models and inner.suffix in (".safetensors", *_OTHER_WEIGHTS):
            left_out.append(str(inner))
        else:
            (staging / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, staging / inner)
    if not left_out:
        return []
    return [f"left out, as they hold the base's weights unpatched: {', '.join(left_out)}."]


def _result(model: Path, checkpoint: Checkpoint, patch: Patch, notes: list[str]) -> FolderResult:
    """Return what is about to be written; the notes may grow."""
    num_pages = 0
    for name, changes in _by_file(checkpoint, patch).items():
        size = (checkpoint.folder / name).stat().st_size
        is_touched = torch.zeros(size // _PAGE_BYTES + 1, dtype=torch.bool, device="cpu")
        for new in changes:
            places = checkpoint.touched(new.name, new.dim, new.indices, _PAGE_BYTES)
            is_touched[places // _PAGE_BYTES] = True
        num_pages += int(is_touched.sum())
    return FolderResult(
        folder=model,
        page_bytes=num_pages * _PAGE_BYTES,
        checkpoint_bytes=checkpoint.num_bytes,
        notes=notes,
    )
