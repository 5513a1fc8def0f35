"""Where the host reads what a device computes, and would wait for it: found on any device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = frozenset(["_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim"])


class Reads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.rpartition("::")[2]
        masks = (x for x in (args[1] if name == "index" else ()) if x is not None)
        if name in _READS or any(mask.dtype in (torch.bool, torch.uint8) for mask in masks):
            self.names.append(name)
        return func(*args, **(kwargs or {}))
