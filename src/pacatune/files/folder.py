"""Write a folder all at once or not at all."""

import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

# Room for the small files beside the tensors, and for what the file system itself takes.
_SPARE_BYTES = 16 * 2**20


def check_output(folder: Path, num_bytes: int) -> None:
    """Refuse an output folder that holds something, or whose disk has no room for `num_bytes`.

    The folder and its parents may be missing.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"output {str(folder)!r} is not a folder; choose another path.")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"output folder {str(folder)!r} is not empty; choose another or empty it first."
        )
    check_room(folder, num_bytes)


def check_room(folder: Path, num_bytes: int) -> None:
    """Refuse a folder, perhaps a missing one, whose disk has no room for `num_bytes`."""
    above = (folder.absolute(), *folder.absolute().parents)
    free = shutil.disk_usage(next(path for path in above if path.exists())).free
    if free < num_bytes + _SPARE_BYTES:
        raise ValueError(
            f"the disk of {str(folder)!r} has {format_bytes(free)} free but "
            f"{format_bytes(num_bytes + _SPARE_BYTES)} are needed; make room or use another disk."
        )


@contextmanager
def staged_folder(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Give an empty folder beside `folder` that takes its place when the block succeeds.

    Whatever happens in the block (an error, Ctrl-C, a full disk), `folder` is either complete or
    as it was before. See `check_output`; a disk that runs full while writing is a ValueError too.
    """
    folder = folder.absolute()
    check_output(folder, num_bytes)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        explained_failure(folder),
        TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as hidden,
    ):
        staging = Path(hidden) / folder.name
        staging.mkdir()
        yield staging
        # Again: someone may have filled the folder while we were writing.
        check_output(folder, num_bytes=0)
        settle(staging, staging)
        staging.rename(folder)


def settle(source: Path, folder: Path) -> list[Path]:
    """Make files as readable as a folder, and put them on disk; return all there is at `source`."""
    paths = [source, *source.rglob("*")]
    for path in paths:
        if path.is_file():  # safetensors makes its own private
            path.chmod(folder.stat().st_mode & 0o666)
        sync(path)
    return paths


def sync(path: Path) -> None:
    """Put a file or folder on disk: a power cut may leave a new name on old or empty contents."""
    # Where folders cannot be opened or synced, nobody can.
    with suppress(*([OSError] if path.is_dir() else [])):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def whole_file(path: Path, *, is_new: bool = False) -> Iterator[Path]:
    """Give a name to write a file under, which takes its own when all of it is there.

    Whatever happens in the block, the file is either as before or complete. If it must be new,
    FileExistsError says that another process was faster (where a disk has hard links). The name is
    in a hidden folder, where writers leave what they make beside it: see `remove_unfinished`.
    """
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    hidden.mkdir()
    hidden.chmod(path.absolute().parent.stat().st_mode & 0o7777)  # files are as readable as that
    try:
        yield (partial := hidden / path.name)
        if is_new:
            publish(partial, path)
        else:
            partial.replace(path)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def remove_unfinished(path: Path) -> None:
    """Remove what a killed process left that was writing a file by `whole_file`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


def publish(written: Path, path: Path) -> None:
    """Give a complete file on the same disk its name, which must be free."""
    try:
        os.link(written, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        written.replace(path)


@contextmanager
def explained_failure(
    path: Path, fix: str = "nothing was left behind. Make room or choose another disk."
) -> Iterator[None]:
    """Raise a ValueError that names `path` where the disk fails in a block; `fix` says what now."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) or not is_write_failure(error):  # or explained before
            raise
        raise ValueError(f"could not write {str(path)!r} ({error}); {fix}") from error


def is_write_failure(error: Exception) -> bool:
    """Whether the disk is full, read-only or broken: no fault of what was being written."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
    # Others keep only the text: safetensors (0.5 Rust's own), tokenizers, and torch's zip files.
    marks = ("os error ", "IoError(Os", "PytorchStreamWriter", "inline_container", "iostream error")
    return any(words in str(error) for words in marks)


def format_bytes(num_bytes: float) -> str:
    """Return a size with the unit that keeps it short, such as `1.5 MiB`."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
