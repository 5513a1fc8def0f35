"""SIGTERM (from a scheduler, say) ends a run as Ctrl-C does: paid replies are kept."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["termination_interrupts"]


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt inside this block when SIGTERM arrives; a second one kills."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.getsignal(signal.SIGTERM)

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
