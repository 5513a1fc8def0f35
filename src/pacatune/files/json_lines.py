"""A file of JSON lines that grows while a run goes on, and survives its end at any moment."""

import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pacatune.files.owned_folder import write_whole

Row = dict[str, Any]


class JsonLines:
    """Rows of JSON, each written whole before the next; from several threads if need be.

    `rows` is what the file held. A run that is killed while it writes leaves part of a line at the
    end: it is removed, and `notes` says so.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read()

    def append(self, row: Row) -> None:
        """Write a row; when this returns, it is on the disk."""
        rest = _line(row).encode("ascii")
        # Unbuffered: closing a buffer that could not be written would try once more.
        with self._lock, self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                # A full disk; what another thread appends must begin on a line of its own.
                file.truncate(size)
                raise

    def replace(self, rows: Iterable[Row]) -> None:
        """Write the file anew, all at once."""
        write_whole(self.path, "".join(map(_line, rows)))

    def _read(self) -> None:
        *lines, last = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            row = _parse(line)
            if row is not None:
                self.rows.append(row)
            elif line.strip():
                raise ValueError(
                    f"{self.path}, line {number} is damaged: {line[:60]!r}; remove that line, and "
                    "what it held is made again."
                )
        if not last:
            return
        row = _parse(last)
        with self.path.open("r+b") as file:
            if row is not None:
                self.rows.append(row)
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
                return
            file.truncate(sum(len(line) + 1 for line in lines))
        self.notes.append(f"the last line of {self.path} was cut off; it is removed.")


def _line(row: Row) -> str:
    # ASCII: some readers split lines at other characters too.
    return json.dumps(row) + "\n"


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
