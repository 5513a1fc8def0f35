"""Ctrl-C and SIGTERM end a run with a checkpoint."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainerControl, TrainerState, TrainingArguments

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by a signal, after its checkpoint was saved."""


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """Saves and stops after the step in which a signal arrived, in all processes at the same step.

    Args:
        accelerator: Lets the processes agree.
        notify: Called once when the signal arrives.
    """

    def __init__(self, accelerator: "Accelerator", notify: Callable[[], None]) -> None:
        self._accelerator = accelerator
        self._notify = notify
        self._received = False
        self.stopped = False

    def on_step_end(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **_: Any,
    ) -> None:
        """Ask for a checkpoint and the end, once any process was signalled."""
        received = self._received
        if self._accelerator.num_processes > 1:
            # A signal reaches processes at different steps; saving alone would wait for ever.
            if received:
                self._accelerator.set_trigger()
            received = self._accelerator.check_trigger()
        if received:
            self.stopped = True
            control.should_save = state.global_step > 0
            control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside this block; a second one has its usual effect at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}

        def receive(number: int, frame: FrameType | None) -> None:
            self._received = True
            for each, handler in before.items():
                signal.signal(each, handler)
            self._notify()

        for number in _SIGNALS:
            signal.signal(number, receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
