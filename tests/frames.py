"""Counts the Python functions of ours that run: what a GPU waits for where tokens are few."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def frames_of_pacatune(*others: str) -> Iterator[Counter[str]]:
    """Yield how often each function is called, and those in other files; tuples are made by one."""
    calls: Counter[str] = Counter()
    files = ("/pacatune/", "<string>", *others)

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and any(name in code.co_filename for name in files):
            calls[code.co_qualname] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(before)
