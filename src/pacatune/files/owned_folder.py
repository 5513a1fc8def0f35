"""A folder of results in which only files that we wrote are replaced or deleted.

`.pacatune/files.jsonl` in it names them: a line for each, with its size and digest, written before
the file appears. A file that has another content, or no line, is the user's and stays as it is.
"""

import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

OURS = ".pacatune"
"""What is in a folder of this name, beside such a list, is ours."""
_LIST_NAME = "files.jsonl"
_HEAD = "folder_of"
# A larger file is told from others by its size, its date and by samples.
_WHOLE_BYTES, _NUM_SAMPLES = 2**20, 16


def to_json(values: Any) -> str:
    """Return the text of a JSON file that people read too."""
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def write_whole(path: Path, text: str) -> None:
    """Write a file all at once: whatever happens, it is either as before or complete."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path, lock_name: str = ".pacatune-lock") -> Iterator[None]:
    """Keep other processes out of a folder that exists; refuse one that another process is in.

    The lock is the operating system's: it ends with the process, however that ends.
    """
    lock = FileLock(folder / lock_name)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"another run is at work in {folder}; wait for its end, or choose another folder: "
            "--output DIR."
        ) from error
    try:
        yield
    finally:
        lock.release()


class _Mark(NamedTuple):
    """What tells a file from others of its name."""

    size: int
    digest: str


def _mark_of(path: Path) -> _Mark:
    size = path.stat().st_size
    digest = hashlib.sha256()
    if size > _WHOLE_BYTES:
        digest.update(str(path.stat().st_mtime_ns).encode())
    step = max(size // _NUM_SAMPLES, _WHOLE_BYTES // _NUM_SAMPLES)
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            digest.update(file.read(min(step, _WHOLE_BYTES // _NUM_SAMPLES)))
    return _Mark(size, digest.hexdigest())


@dataclass
class _Listed:
    """What the list of a folder says."""

    kind: str
    marks: dict[str, set[_Mark]] = field(default_factory=dict)
    patterns: list[str] = field(default_factory=list)

    def names(self, folder: Path, name: str) -> bool:
        """Whether a file that is in the folder is ours."""
        path = folder / name
        if path.is_symlink() or not path.is_file():
            return False
        if any(fnmatchcase(name, pattern) for pattern in self.patterns):
            return True
        known = self.marks.get(name, set())
        size = path.stat().st_size
        return any(mark.size == size for mark in known) and _mark_of(path) in known


def _read_list(folder: Path) -> _Listed | None:
    """Return what a folder's list says, None if it has none; a line that was cut off is none."""
    path = folder / OURS / _LIST_NAME
    if (folder / OURS).is_symlink() or path.is_symlink() or not path.is_file():
        return None
    listed = None
    for line in path.read_bytes().split(b"\n"):
        with suppress(ValueError, KeyError, TypeError):
            values = json.loads(line)
            if listed is None:
                listed = _Listed(str(values[_HEAD]))
            elif "pattern" in values:
                listed.patterns.append(str(values["pattern"]))
            else:
                mark = _Mark(values["size"], values["digest"])
                listed.marks.setdefault(values["name"], set()).add(mark)
    return listed


@dataclass(frozen=True, kw_only=True)
class OwnedFolder:
    """A folder that one kind of command may fill, and fill again.

    Names in it are relative, with `/`. A folder in it with a list of its own is another command's:
    what that list names is not foreign here, and not ours to delete.
    """

    path: Path
    kind: str
    """Whose results they are, with its article, for messages: `a demo`."""
    option: str = "`--output DIR`"
    """What chooses the folder, for messages."""

    @property
    def is_ours(self) -> bool:
        """Whether a command of this kind has begun to fill the folder."""
        listed = _read_list(self.path)
        return listed is not None and listed.kind == self.kind

    def check(self, goes_on: bool = False, outputs: Iterable[str] = ("*",)) -> None:
        """Refuse a folder in which something would be mixed up, or replaced that is not ours.

        Args:
            goes_on: Whether the command may go on with results that are there.
            outputs: Patterns of what in the folder is in the way then, if it is not ours.

        Raises:
            FileExistsError: If it is a file, another kind's folder, or has such files.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"output {self.path} is a file; choose another: {self.option}.")
        listed = _read_list(self.path)
        if listed is not None and listed.kind != self.kind:
            raise FileExistsError(
                f"output folder {self.path} holds {listed.kind}, not {self.kind}; choose another: "
                f"{self.option}."
            )
        wanted = tuple(outputs) if goes_on and listed is not None else ("*",)
        foreign = [
            name
            for name in self.foreign()
            if any(fnmatchcase(name.partition("/")[0], one) for one in wanted)
        ]
        if foreign:
            more = f" and {len(foreign) - 10} more" if len(foreign) > 10 else ""
            raise FileExistsError(
                f"output folder {self.path} holds files that {self.kind} did not write, or that "
                f"were changed since ({', '.join(foreign[:10])}{more}); they stay as they are: "
                f"move them, or choose another folder: {self.option}."
            )

    def start_anew(self) -> None:
        """Make the folder ready for other results; what is ours in it is deleted, nothing else."""
        self.check()
        self.clear()
        self.begin()

    @contextmanager
    def going_on(self, *outputs: str) -> Iterator[None]:
        """Make the folder ready to add results, for this process alone until the end of the block.

        Args:
            *outputs: Patterns of the names that the command replaces.
        """
        self.check(goes_on=True, outputs=outputs)
        self.begin()
        with alone_in(self.path, f"{OURS}/lock"):
            yield

    def begin(self) -> None:
        """Make the folder, and its list if it has none."""
        (self.path / OURS).mkdir(parents=True, exist_ok=True)
        if _read_list(self.path) is None:
            self._append([{_HEAD: self.kind}])

    def foreign(self, below: str = "") -> list[str]:
        """Return the files that are not ours, of the whole folder or at one name and below it."""
        return sorted(_foreign(self.path, below))

    def owned(self) -> list[str]:
        """Return the files that are ours to delete."""
        listed = _read_list(self.path)
        if listed is None:
            return []
        return [name for name in _files(self.path) if listed.names(self.path, name)]

    def claim(self, pattern: str) -> None:
        """Own what will be written by others on our behalf, by the pattern of its names."""
        listed = _read_list(self.path)
        if listed is None or pattern not in listed.patterns:
            self._append([{"pattern": pattern}])

    def write(self, name: str, text: str, *, edited: bool = True) -> None:
        """Write a file all at once, in the place of one of ours; see `publish`."""
        partial = self.path / OURS / "partial"
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
        self.publish(partial, name, edited=edited)

    def write_json(self, name: str, values: Any, *, edited: bool = True) -> None:
        """Write values as a JSON file that people read too; see `write`."""
        self.write(name, to_json(values), edited=edited)

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """Give an empty folder, whose files and folders are published when the block succeeds."""
        with TemporaryDirectory(dir=self.path / OURS) as staging:
            yield Path(staging)
            for path in sorted(Path(staging).iterdir()):
                self.publish(path, path.name)

    def publish(self, source: Path, name: str, *, edited: bool = True) -> None:
        """Move a complete file or folder to its place, on disk before it is seen there.

        Args:
            source: The file or folder, on the same disk.
            name: Its place.
            edited: Whether people may edit it, so that only this content is ours.

        Raises:
            FileExistsError: If something is there that is not ours.
        """
        target = self.path / name
        if foreign := self.foreign(name):
            raise FileExistsError(
                f"{self.path / foreign[0]} is not of {self.kind}, and stays as it is; move it "
                "out of the way."
            )
        # safetensors makes its files private; results should be as readable as their folder.
        mode = self.path.stat().st_mode & 0o666
        lines = []
        for path in [source, *source.rglob("*")]:
            if path.is_file():
                path.chmod(mode)
                inner = (target / path.relative_to(source)).relative_to(self.path)
                mark = {"name": inner.as_posix(), **_mark_of(path)._asdict()}
                lines.append(mark if edited else {"pattern": glob.escape(inner.as_posix())})
            _sync(path)
        self._append(lines)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            shutil.rmtree(target)
        source.replace(target)
        _sync(target.parent)

    def clear(self) -> None:
        """Delete what is ours, and the folders that this leaves empty."""
        for name in self.owned():
            self._remove(self.path / name)

    def remove(self, name: str) -> None:
        """Delete a file if it is ours."""
        listed = _read_list(self.path)
        if listed is not None and listed.names(self.path, name):
            self._remove(self.path / name)

    def _remove(self, path: Path) -> None:
        path.unlink()
        with suppress(OSError):  # not empty
            while (path := path.parent) != self.path:
                path.rmdir()

    def _append(self, lines: list[dict[str, Any]]) -> None:
        with (self.path / OURS / _LIST_NAME).open("ab") as file:
            # Each on a line of its own, also where the one before was cut off.
            file.write("".join(f"\n{json.dumps(line)}" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())


def _files(folder: Path, below: str = "") -> Iterator[str]:
    """Yield the names of all files and links of a folder but those of lists, `below` a name."""
    top = folder
    for part in Path(below).parts:
        top /= part
        if top.is_symlink() or (top.exists() and not top.is_dir()):
            yield top.relative_to(folder).as_posix()
            return
    for parent, folders, names in os.walk(top):
        here = Path(parent)
        if OURS in folders and (_read_list(here) is not None or _is_begun(here)):
            folders.remove(OURS)
        links = [name for name in folders if (here / name).is_symlink()]
        for name in sorted([*names, *links]):
            yield (here / name).relative_to(folder).as_posix()
        folders.sort()


def _is_begun(folder: Path) -> bool:
    """Whether a command was killed before it had written its list."""
    path = folder / OURS / _LIST_NAME
    return [*path.parent.iterdir()] == [path] and path.is_file() and not path.stat().st_size


def _foreign(folder: Path, below: str) -> Iterator[str]:
    lists: dict[Path, _Listed | None] = {}
    for name in _files(folder, below):
        path = folder / name
        for parent in (path.parent, *path.parent.parents):
            if parent not in lists:
                lists[parent] = _read_list(parent)
            listed = lists[parent]
            if listed is not None and listed.names(parent, path.relative_to(parent).as_posix()):
                break
            if parent == folder:
                yield name
                break


def _sync(path: Path) -> None:
    # Without this a power cut may leave the new name on old or empty contents.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
