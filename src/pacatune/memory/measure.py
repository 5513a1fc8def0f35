"""Measure what training really holds: activations kept for backward, peaks of the process."""

import contextlib
import sys
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn


class SavedBytes:
    """Context that counts the bytes autograd keeps for backward.

    Counts each storage once, however many views of it are saved, and leaves out the storages of
    the model's parameters and buffers, which exist anyway. What a checkpointed block recomputes
    is not kept, so only its inputs count.

        with SavedBytes(model) as saved:
            loss = model(**batch).loss
        loss.backward()
        saved.num_bytes

    Args:
        model: Its parameters and buffers are not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        held = [*model.parameters(), *model.buffers()]
        self._model_storages = {_address(tensor) for tensor in held}
        self._num_bytes: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept)

    @property
    def num_bytes(self) -> int:
        """Bytes of the distinct storages saved so far."""
        return sum(self._num_bytes.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        address = _address(tensor)
        if address not in self._model_storages:
            self._num_bytes[address] = tensor.untyped_storage().nbytes()
        # Detached: a node that kept its own output would keep itself alive.
        return tensor.detach()

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, trace)


def peak_process_bytes() -> int:
    """Return the largest resident size that this process has had, or had since the last reset."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would count what the parent held when it started this process.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_process_bytes() -> None:
    """Let `peak_process_bytes` start anew from what the process holds now, where Linux can."""
    # Elsewhere, and in sandboxes that forbid it, the peak stays that of the whole process.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
