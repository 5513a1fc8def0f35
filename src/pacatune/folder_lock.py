"""One process at a time in an output folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
