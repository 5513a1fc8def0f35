"""Two processes over one copy of the weights: one trains, the other reads what is trained.

The trainer's columns are in the shared weights, as in all training that is resident, so what is
trained is what is read. Between an optimizer step and the next nothing is written, and both may
compute at once. The one time that columns change, the trainer waits until nobody reads.

    trainer    ...  step  publish()                 forward, backward ...  step  publish()
    weights    W'1        W'2: all layers, locked                                W'3
    sampler    pass ... |  waits  | pass  pass  pass ...                 |waits| pass

A small file carries it: its lock (flock), which the system takes from a process that dies, and its
words: whether columns are published, how many times, whether the trainer waits, who it is. A reader
holds the lock shared for a pass; whoever changes weights holds it alone. What training itself
writes (`state_dict` puts the pretrained columns back, say) goes through the same gate: from then on
nothing is published until the trainer does it again.
"""

import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pacatune.residency import Residency
from pacatune.residency.watching import LOCK

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_MAGIC = 0x70616361_73796E63
_WORDS = struct.Struct("<5q")  # magic, is published, version, process that waits, the trainer's
_WORD = struct.Struct("<q")
_POLL_SECONDS = 0.0005


class SharedWeights:
    """What a trainer and its readers know of the weights that they share; one object in each.

    Args:
        path: A file of their own, on a local disk; made if it is missing. To be removed by whoever
            has made it.
        timeout: Seconds to wait for each other, where a call gives none.

    Raises:
        ValueError: If the file is another one, or the system has no flock.
    """

    def __init__(self, path: str | Path, *, timeout: float = 60.0) -> None:
        if fcntl is None:
            raise ValueError("weights are shared by flock, which Windows does not have.")
        self.path, self.timeout = Path(path), timeout
        self._threads = threading.RLock()
        self._num_readers = self._depth = 0
        self._layers: dict[str, Any] = {}
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        self._process = os.getpid()
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        try:
            size = os.fstat(self._handle).st_size
            if size == 0:
                os.pwrite(self._handle, _WORDS.pack(_MAGIC, 0, 0, 0, 0), 0)
            elif size != _WORDS.size or self._get(0) != _MAGIC:
                raise ValueError(f"{self.path} is another file; choose a path for this alone.")
        except BaseException:
            os.close(self._handle)  # and with it the lock
            raise
        fcntl.flock(self._handle, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go of the file, and of the model."""
        for layer in self._layers.values():
            layer.residency.restore()
            layer.residency.gate = None
        self._layers = {}
        os.close(self._handle)

    @property
    def version(self) -> int:
        """How many times columns were published."""
        return self._get(2)

    def _get(self, place: int) -> int:
        return int(_WORD.unpack(os.pread(self._handle, _WORD.size, place * _WORD.size))[0])

    def _set(self, place: int, value: int) -> None:
        os.pwrite(self._handle, _WORD.pack(value), place * _WORD.size)

    # The trainer.

    def attach(self, model: nn.Module) -> None:
        """Let an adapted model's training write into weights that processes share.

        Args:
            model: With `share_memory()` called on its base, or on it, before a reader got it. All
                that is adapted must be `nn.Linear`.

        Raises:
            ValueError: If columns of a layer cannot be in its weight; layer and reason are named.
        """
        layers = _residents(model)
        for layer in layers.values():
            layer.residency.gate = self
        self._layers = layers
        self._set(4, os.getpid())

    def publish(self, *, timeout: float | None = None) -> int:
        """Have all current columns in the weights, and let others read them.

        Call it after each optimizer step, and after what puts the pretrained columns back
        (`model.zero_grad()`, `state_dict()`, saving).

        Returns:
            The version that readers see.

        Raises:
            TimeoutError: If a reader does not come to the end of its pass; nothing was written.
            ValueError: If columns cannot be in a weight now; layer and reason are named.
        """
        if not self._layers:
            raise ValueError("no model is attached; call `attach(model)` in the trainer.")
        # The lock first, as whoever looks at a weight has it when he comes to the gate.
        with LOCK, self.closed(timeout):
            for name, layer, update in _updates(self._layers):
                if not layer.residency.write(update):
                    _refuse(name, layer.residency.obstacle(update[0]) or "its weight is in use")
            for name, layer, update in _updates(self._layers):
                if not layer.residency.holds(update):
                    _refuse(name, layer.residency.obstacle(update[0]) or "its weight is in use")
            _synchronize()
            self._set(2, self._get(2) + 1)
            self._set(1, 1)
        return self._get(2)

    @contextmanager
    def closed(self, timeout: float | None = None) -> Iterator[None]:
        """Keep readers out while columns change; nothing is published after it."""
        with self._threads:
            if self._depth == 0:
                self._set(3, os.getpid())
                try:
                    self._lock(fcntl.LOCK_EX, timeout, "a reader has not ended its pass")
                finally:
                    self._set(3, 0)
                self._set(1, 0)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    _synchronize()
                    fcntl.flock(self._handle, fcntl.LOCK_UN)

    # A reader.

    @contextmanager
    def reading(self, *, timeout: float | None = None) -> Iterator[int]:
        """Read the weights while they are published and stay as they are.

        Hold it for a forward pass, or for a whole `generate`: the trainer's next publication waits
        for its end.

        Yields:
            The version of the columns.

        Raises:
            TimeoutError: If nothing is published in time; it says whether the trainer is there.
        """
        if self._layers:
            raise ValueError("this object is the trainer's; make another one to read.")
        with self._threads:
            if self._num_readers == 0:
                self._enter(self.timeout if timeout is None else timeout)
            self._num_readers += 1
        try:
            yield self._get(2)
        finally:
            with self._threads:
                self._num_readers -= 1
                if self._num_readers == 0:
                    _synchronize()
                    fcntl.flock(self._handle, fcntl.LOCK_UN)

    def _enter(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while True:
            waiting = self._get(3)  # it comes first, or it might never; unless it has died
            if self._get(1) and not (waiting and _is_alive(waiting)):
                left = max(0.0, end - time.monotonic())
                self._lock(fcntl.LOCK_SH, left, "the trainer has not ended writing")
                if self._get(1):
                    return
                fcntl.flock(self._handle, fcntl.LOCK_UN)
            if time.monotonic() > end:
                there = _describe(self._get(4))
                raise TimeoutError(f"no columns were published for {timeout:g} s; {there}.")
            time.sleep(_POLL_SECONDS)

    def _lock(self, kind: int, timeout: float | None, reason: str) -> None:
        if self._process != os.getpid():
            raise ValueError("this object belongs to another process; make one in each.")
        seconds = self.timeout if timeout is None else timeout
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self._handle, kind | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"{reason} for {seconds:g} s; nothing was written."
                    ) from None
                time.sleep(_POLL_SECONDS)


def _residents(model: nn.Module) -> dict[str, Any]:
    layers: dict[str, Any] = {
        name: one for name, one in model.named_modules() if hasattr(one, "paca_delta")
    }
    if not layers:
        raise ValueError("the model has no PaCA layers; adapt it first.")
    for name, layer in layers.items():
        if not isinstance(layer.residency, Residency):
            _refuse(name, layer.why_additive())
        weight: Any = layer.residency.find_weight()
        if weight is not None and weight.is_cpu and not weight.is_shared():
            _refuse(name, "its weight is not shared: call `model.share_memory()` before")
    return layers


def _updates(layers: dict[str, Any]) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    for name, layer in layers.items():
        names = [one for one in layer.active_adapters if one in layer.paca_delta]
        if layer._disable_adapters or layer.merged_adapters or len(names) != 1:
            _refuse(name, layer.why_additive())
        yield name, layer, layer.update_of(names[0])


def _refuse(name: str, reason: str) -> None:
    raise ValueError(
        f"columns cannot be in the shared weight of {name!r}: {reason}. Send them to a copy of the "
        "model instead (`ColumnSource`, `ColumnReceiver`)."
    )


def _describe(process: int) -> str:
    if not process:
        return "no trainer has attached a model"
    if not _is_alive(process):
        return f"the trainer (process {process}) has ended"
    return f"the trainer (process {process}) is there, but has not called `publish` since it wrote"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _synchronize() -> None:
    """Wait for a GPU's kernels: a lock says nothing of those."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
