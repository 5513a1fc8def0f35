"""What a trainer and the engine in vLLM's workers have in common: names, and a process group."""

from datetime import timedelta
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

BACKEND = "pacatune"
"""Name of the engine in vLLM's `weight_transfer_config`."""


def weight_transfer(part: str = "") -> Any:
    """Return a module of vLLM's `weight_transfer`, which its main branch has in `backends`."""
    try:
        return import_module(f"vllm.backends.distributed.weight_transfer{part}")
    except ModuleNotFoundError:
        return import_module(f"vllm.distributed.weight_transfer{part}")


class Broadcast:
    """A process group of a trainer (rank 0) and vLLM's workers, beside those that they have.

    gloo on CPUs, NCCL on GPUs. All processes make it together.
    """

    def __init__(
        self, host: str, port: int, rank: int, size: int, device: torch.device, timeout: float
    ) -> None:
        from torch import distributed
        from torch.distributed import distributed_c10d as c10d

        self.device = device
        wait = timedelta(seconds=timeout)
        # Public, though not in the types of torch.
        store_class = cast(Any, distributed).TCPStore
        store = store_class(host, port, size, is_master=rank == 0, timeout=wait)
        self._group: Any
        if device.type == "cpu":
            self._group = c10d.ProcessGroupGloo(store, rank, size, wait)
        else:
            options = c10d.ProcessGroupNCCL.Options()
            options._timeout = wait
            self._group = c10d.ProcessGroupNCCL(store, rank, size, options)

    def broadcast(self, buffer: Tensor) -> Tensor:
        """Send a buffer (rank 0), or receive into it."""
        from torch.distributed import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank = 0
        part = buffer.to(self.device)
        self._group.broadcast([part], options).wait()
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return part
