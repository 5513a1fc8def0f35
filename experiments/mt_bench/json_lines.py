"""A file of JSON lines that grows while a run goes on, and survives its end at any moment."""

import threading
from collections.abc import Iterable
from pathlib import Path

from pacatune.files.owned_folder import Row, append_rows, read_rows, to_lines, write_whole


class JsonLines:
    """Rows of JSON, each written whole before the next; from several threads if need be.

    `rows` is what the file held.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read_rows(path)
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, row: Row) -> None:
        """Write a row; when this returns, it is on the disk."""
        with self._lock:
            append_rows(self.path, [row])

    def replace(self, rows: Iterable[Row]) -> None:
        """Write the file anew, all at once."""
        write_whole(self.path, to_lines(rows))
