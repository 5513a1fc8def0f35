"""How syncs get from a trainer to those who serve the model.

InProcess      a queue; tensors are handed over as they are
File           a folder with one safetensors file per sync, complete when it has its name
"""

import json
import queue
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pacatune.files.folder import explained_failure, whole_file
from pacatune.files.json_file import parse_json_object
from pacatune.files.plain import find_file
from pacatune.files.tensor_file import read_layout, read_tensors, write_tensors
from pacatune.sync.message import Columns, Reader, to_wire

_KEY = "pacatune_sync"
_ENDED = "the sender has closed; no more columns will come."
_POLL_S = 0.05
_KEPT = 2
_NAME = re.compile(r"(\d{6,18})\.safetensors")


class Transport(Protocol):
    """Brings syncs, in order."""

    def send(self, columns: Columns, timeout: float | None = None) -> None:
        """Send one; TimeoutError or ConnectionError if nobody takes it."""

    def receive(self, timeout: float | None = None) -> Columns:
        """Wait for the next one; EOFError after the sender has closed."""

    def close(self) -> None:
        """Tell receivers that nothing more will come."""


class InProcess:
    """Between threads, or steps, of one process.

    Args:
        capacity: Syncs that may wait; a sender then waits for the receiver.
        timeout: Seconds to wait, where a call gives none.
    """

    def __init__(self, *, capacity: int = 8, timeout: float = 60.0) -> None:
        self.timeout = timeout
        self._queue: queue.Queue[Columns | None] = queue.Queue(capacity)

    def send(self, columns: Columns | None, timeout: float | None = None) -> None:
        """Put a sync into the queue; None: nothing more will come."""
        seconds = self.timeout if timeout is None else timeout
        try:
            self._queue.put(columns, timeout=seconds)
        except queue.Full:
            raise TimeoutError(
                f"{self._queue.maxsize} syncs wait, and the receiver has taken none for "
                f"{seconds:g} s; is it still there?"
            ) from None

    def receive(self, timeout: float | None = None) -> Columns:
        """Take the next sync."""
        seconds = self.timeout if timeout is None else timeout
        try:
            columns = self._queue.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"nothing was sent for {seconds:g} s.") from None
        if columns is None:
            self._queue.put(None)  # for whoever asks again
            raise EOFError(_ENDED)
        return columns

    def close(self) -> None:
        """Tell the receiver that nothing more will come."""
        self.send(None)


class File:
    """A folder that trainer and servers see, on one disk or a shared one.

    Each sync is a file, `000001.safetensors` and so on; it gets its name when it is complete.
    A reader that comes late, or is slow, begins with the last one that follows none. Whenever such
    a one is written, files before the last but one are removed.

    Args:
        folder: Made if it is missing. A trainer that was restarted goes on in it.
        timeout: Seconds that a reader waits, where a call gives none.
    """

    def __init__(self, folder: str | Path, *, timeout: float = 60.0) -> None:
        self.folder, self.timeout = Path(folder), timeout
        self._last_read, self._reader = 0, Reader()
        self._last_written: int | None = None

    def send(self, columns: Columns, timeout: float | None = None) -> None:
        """Write a sync; a file needs nobody to take it, so nothing is waited for."""
        words, buffer = to_wire(columns)
        self._write(words, buffer)
        if words["since"] == 0:
            for number in self._numbers()[:-_KEPT]:  # which nobody needs any more
                self._path(number).unlink(missing_ok=True)

    def close(self) -> None:
        """Tell readers that nothing more will come."""
        self._write({"kind": "end"}, torch.empty(0, dtype=torch.uint8, device="cpu"))

    def receive(self, timeout: float | None = None) -> Columns:
        """Return the next sync, or the last one that follows none if that is later."""
        seconds = self.timeout if timeout is None else timeout
        end = time.monotonic() + seconds
        while (columns := self._next()) is None:
            if time.monotonic() > end:
                raise TimeoutError(
                    f"nothing new was written to {str(self.folder)!r} for {seconds:g} s; is the "
                    "trainer still there?"
                )
            time.sleep(_POLL_S)
        return columns

    def _next(self) -> Columns | None:
        """Read the last file that follows none, or else the next; None where none is new."""
        new = [number for number in self._numbers() if number > self._last_read]
        with suppress(FileNotFoundError):  # removed since, as a later one is complete
            words = {number: self._words(number) for number in new}
            complete = [number for number in new if words[number].get("since") == 0]
            for number in complete[-1:] or new[:1]:
                tensors = read_tensors(self._path(number))
                self._last_read = number
                if words[number].get("kind") == "end":
                    raise EOFError(_ENDED)
                if "buffer" not in tensors:
                    raise ValueError(
                        f"{self._path(number)} is no message of a trainer: it has no buffer."
                    )
                return self._reader.read(words[number], tensors["buffer"])
        return None

    def _numbers(self) -> list[int]:
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        names = (_NAME.fullmatch(path.name) for path in paths)
        return sorted(int(name[1]) for name in names if name)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06}.safetensors"

    def _words(self, number: int) -> dict[str, Any]:
        path = find_file(self.folder, self._path(number).name)
        text = read_layout(path).metadata.get(_KEY)
        if not isinstance(text, str):
            raise ValueError(f"{path} is no message of a trainer; use a folder for syncs alone.")
        return parse_json_object(text.encode(), source=f"the metadata of {path}")

    def _write(self, words: dict[str, Any], buffer: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        last = max(self._numbers(), default=0)
        other = f"another trainer writes to {str(self.folder)!r}; give each a folder of its own."
        if self._last_written is not None and last > self._last_written:
            raise FileExistsError(other)
        path = self._path(last + 1)
        try:
            with explained_failure(path), whole_file(path, is_new=True) as partial:
                write_tensors({"buffer": buffer}, partial, metadata={_KEY: json.dumps(words)})
        except FileExistsError:
            raise FileExistsError(other) from None
        self._last_written = last + 1
