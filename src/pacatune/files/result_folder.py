"""The folder of one command's results, marked by a JSON file: only ever its own."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK_NAME = ".lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder that exists, until the end of the block.

    The lock is the operating system's: it ends with the process, however that ends.

    Raises:
        ValueError: If another process is in it.
    """
    lock = FileLock(folder / LOCK_NAME)
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


def write_whole(path: Path, text: str) -> None:
    """Write a file all at once: whatever happens, it is either as before or complete."""
    partial = path.with_name(f".{path.name}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def to_json(values: Any) -> str:
    """Return the text of a JSON file that people read too."""
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


@dataclass(frozen=True, kw_only=True)
class ResultFolder:
    """A folder that one kind of run may fill, and fill again."""

    path: Path
    mark: str
    """Name of the JSON file with the results, which says whose folder it is."""
    kind: str
    """Whose results they are, with its article, for messages: `a demo`."""
    others: tuple[str, ...] = ()
    """Names of what a run writes beside `mark`; the next run removes them."""

    def open(self) -> None:
        """Make the folder ready; what an earlier run wrote is removed, nothing else.

        Raises:
            FileExistsError: If it is a file or holds something without the mark.
        """
        self._check()
        self.path.mkdir(parents=True, exist_ok=True)
        self._begin()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder ready, for this process alone until the end of the block.

        Raises:
            FileExistsError: If it is a file or holds something without the mark.
            ValueError: If another process is in it.
        """
        self._check()
        self.path.mkdir(parents=True, exist_ok=True)
        with alone_in(self.path):
            self._begin()
            yield

    def _check(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"output {self.path} is a file; choose another: --output DIR.")
        holds = {path.name for path in self.path.iterdir()} if self.path.exists() else set()
        if holds - {LOCK_NAME} and self.mark not in holds:
            raise FileExistsError(
                f"output folder {self.path} holds files but no {self.mark}, so they are not from "
                f"{self.kind} and stay as they are; choose another: --output DIR."
            )

    def _begin(self) -> None:
        for name in self.others:
            (self.path / name).unlink(missing_ok=True)
        self.write({"finished": False})

    def write(self, result: dict[str, Any]) -> None:
        """Write the results, which are also the mark, all at once."""
        write_whole(self.path / self.mark, to_json(result))
