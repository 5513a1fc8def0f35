"""A folder of results in which only files that we wrote are replaced or deleted.

`.pacatune/files.jsonl` in it names them: a line for each, with its size and digest, written before
the file appears. A file that has another content, or no line, is the user's and stays as it is.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pacatune.files.folder import settle, sync, whole_file

OURS = ".pacatune"
"""Folder for the list of files, and for what is not complete yet."""
_HEAD = "folder_of"
# A larger file is told from others by its size and date.
_MAX_DIGESTED = 2**20

Row = dict[str, Any]


def to_json(values: Any) -> str:
    """Return the text of a JSON file that people read too."""
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def write_whole(path: Path, text: str) -> None:
    """Write a file all at once: whatever happens, it is either as before or complete."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
        sync(partial)


@contextmanager
def alone_in(folder: Path, lock_name: str = ".pacatune-lock") -> Iterator[None]:
    """Keep other processes out of a folder; refuse a missing one, and one that another is in.

    The lock is the operating system's: it ends with the process, however that ends.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {str(folder)!r} does not exist; check the path.")
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


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file of JSON lines, if there is one; a line that was cut off is none."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows at the end of a file; when this returns, they are on the disk."""
    # In ASCII: some readers split lines at other characters too.
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with path.open("a+b") as file:
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
            if file.read() != b"\n":  # a full disk or a kill has cut off the last line
                text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True, kw_only=True)
class OwnedFolder:
    """A folder that one kind of command may fill, and fill again.

    Names in it are relative, with `/`.
    """

    path: Path
    kind: str
    """Whose results they are, with its article, for messages: `a demo`."""
    option: str = "`--output DIR`"
    """What chooses the folder, for messages."""

    @property
    def _list(self) -> Path:
        return self.path / OURS / "files.jsonl"

    @property
    def _found_kind(self) -> str | None:
        """Whose folder it is, None if it has no list of ours, or a link to another's."""
        rows = [] if self._list.parent.is_symlink() else read_rows(self._list)
        return next((row[_HEAD] for row in rows if _HEAD in row), None)

    @property
    def is_ours(self) -> bool:
        """Whether a command of this kind has begun to fill the folder."""
        return self._found_kind == self.kind

    def check(self, outputs: Iterable[str] = ("*",)) -> None:
        """Refuse a folder in which something would be mixed up, or replaced that is not ours.

        Args:
            outputs: Patterns of what is in the way if it is not ours, where a command goes on with
                results that are there.

        Raises:
            FileExistsError: If it is a file, another kind's folder, or has such files.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"output {self.path} is a file; choose another: {self.option}.")
        kind = self._found_kind
        if kind not in (None, self.kind):
            raise FileExistsError(
                f"output folder {self.path} holds {kind}, not {self.kind}; choose another: "
                f"{self.option}."
            )
        wanted = ("*",) if kind is None else tuple(outputs)
        foreign = [
            name
            for name in self.foreign()
            if any(fnmatchcase(name.partition("/")[0], pattern) for pattern in wanted)
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
        self.check(outputs)
        self._list.parent.mkdir(parents=True, exist_ok=True)
        with alone_in(self.path, f"{OURS}/lock"):
            self.begin()
            yield

    def begin(self) -> None:
        """Make the folder, and its list if it has none; what a killed process left goes away."""
        self._list.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._staging, ignore_errors=True)
        if self._found_kind is None:
            append_rows(self._list, [{_HEAD: self.kind}])

    def owned(self) -> list[str]:
        """Return the files that are ours to delete."""
        return self._ours(self._files())

    def foreign(self, place: str = "") -> list[str]:
        """Return the files that are not ours: all of them, or those in the way of one at a place.

        Those are at the place, below it, or where one of its folders would be.
        """
        names = [
            name
            for name in self._files()
            if not place or f"{name}/".startswith(f"{place}/") or place.startswith(f"{name}/")
        ]
        ours = {*self._ours(names)}
        return [name for name in names if name not in ours]

    def claim(self, pattern: str) -> None:
        """Own what will be written by others on our behalf, by the pattern of its names."""
        append_rows(self._list, [{"pattern": pattern}])

    def write(self, name: str, text: str, *, edited: bool = True) -> None:
        """Write a file all at once, in the place of one of ours; see `publish`."""
        partial = self._list.with_name("partial")
        partial.write_text(text, encoding="utf-8")
        self.publish(partial, name, edited=edited)

    def write_json(self, name: str, values: Any, *, edited: bool = True) -> None:
        """Write values as a JSON file that people read too; see `write`."""
        self.write(name, to_json(values), edited=edited)

    @property
    def _staging(self) -> Path:
        return self._list.with_name("incomplete")

    @contextmanager
    def staged(
        self, *, last: str = "", edited: bool = True, publishes: bool = True
    ) -> Iterator[Path]:
        """Give a folder, whose files and folders are published when the block succeeds.

        Args:
            last: Name of what is published after all else.
            edited: See `publish`.
            publishes: Whether this process does it, of several that write there.

        Raises:
            FileExistsError: If something of the user's has come in the way; what was written stays
                until the next run begins.
        """
        self._staging.mkdir(parents=True, exist_ok=True)
        kept = not publishes
        try:
            yield self._staging
            if publishes:
                for path in sorted(self._staging.iterdir(), key=lambda p: (p.name == last, p)):
                    self.publish(path, path.name, edited=edited)
        except FileExistsError as error:
            kept = True
            raise FileExistsError(
                f"{error} Until the next run, what is not in its place is in {self._staging}."
            ) from error
        finally:
            if not kept:
                shutil.rmtree(self._staging, ignore_errors=True)

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
        rows = []
        for path in settle(source, self.path):
            if path.is_file():
                inner = (target / path.relative_to(source)).relative_to(self.path)
                rows.append({"name": inner.as_posix(), **(_mark_of(path) if edited else {})})
        append_rows(self._list, rows)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            shutil.rmtree(target)
        source.replace(target)
        sync(target.parent)

    def clear(self, *names: str) -> None:
        """Delete what is ours, of all files or of some, and the folders that this leaves empty."""
        for name in self._ours(names or self._files()):
            path = self.path / name
            path.unlink()
            with suppress(OSError):  # not empty
                while (path := path.parent) != self.path:
                    path.rmdir()

    def _files(self) -> list[str]:
        """Return the names of all files and links, but those in the folder `.pacatune`."""
        paths = (path for path in self.path.rglob("*") if path.is_symlink() or not path.is_dir())
        names = (path.relative_to(self.path).as_posix() for path in paths)
        return sorted(name for name in names if not name.startswith(f"{OURS}/"))

    def _ours(self, names: Iterable[str]) -> list[str]:
        """Return those of the names that the list has, with what the files hold."""
        rows = read_rows(self._list)
        patterns = [row["pattern"] for row in rows if "pattern" in row]
        marks = {(row.get("name"), row.get("size"), row.get("digest")) for row in rows}

        def is_ours(name: str) -> bool:
            path = self.path / name
            if path.is_symlink() or not path.is_file():
                return False
            return (
                (name, None, None) in marks
                or any(fnmatchcase(name, pattern) for pattern in patterns)
                or (name, *_mark_of(path).values()) in marks
            )

        return [name for name in names if is_ours(name)]


def _mark_of(path: Path) -> dict[str, Any]:
    """Return what tells a file from others of its name."""
    size, date = path.stat().st_size, path.stat().st_mtime_ns
    content = path.read_bytes() if size <= _MAX_DIGESTED else str(date).encode()
    return {"size": size, "digest": hashlib.sha256(content).hexdigest()}
