"""Counters of a training step: bytes that autograd keeps for backward, and operations."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, flop_registry


class SavedBytes:
    """Context that counts the bytes autograd keeps for backward.

    Counts each storage once, however many views of it are saved, and leaves out the storages of
    the model's parameters and buffers, which exist anyway. What a checkpointed block recomputes
    is not kept, so only its inputs count; nor is what belongs to a graph that is dropped before the
    context ends, as PEFT's DoRA drops that of its norms.

        with SavedBytes(model) as saved:
            loss = model(**batch).loss
        loss.backward()
        saved.num_bytes
    """

    def __init__(self, model: nn.Module) -> None:
        self._held = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._saved: list[weakref.ref[_Kept]] = []
        self._hooks = saved_tensors_hooks(self._pack, lambda kept: kept.tensor)
        self.num_bytes = 0
        """Bytes of the distinct storages that are kept when the context ends."""

    def _pack(self, tensor: Tensor) -> "_Kept":
        # Holds the memory, so that no address comes twice. Detached: a node that kept its own
        # output would keep itself alive.
        kept = _Kept(tensor.detach())
        self._saved.append(weakref.ref(kept))
        return kept

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        sizes: dict[int, int] = {}
        for kept in filter(None, (link() for link in self._saved)):
            is_sparse = kept.tensor.layout is torch.sparse_coo
            parts = (kept.tensor._indices(), kept.tensor._values()) if is_sparse else (kept.tensor,)
            sizes |= {_address(part): part.untyped_storage().nbytes() for part in parts}
        self.num_bytes = sum(size for key, size in sizes.items() if key not in self._held)


class _Kept:
    """What a node holds, so that its end is seen."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def count_flops(forward: Callable[[], Tensor]) -> dict[str, int]:
    """Return the operations of `forward` and `backward` of a loss; to multiply and add are two."""
    aten = torch.ops.aten
    attention = aten._scaled_dot_product_flash_attention
    backward = aten._scaled_dot_product_flash_attention_backward
    formulas = {  # of what torch does not know
        aten.addmm_: flop_registry[aten.addmm],
        aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[attention],
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[backward],
    }
    before, after = FlopCounterMode(display=False), FlopCounterMode(display=False)
    before.flop_registry = after.flop_registry = flop_registry | formulas
    with before:
        loss: Any = forward()
    with after:
        loss.backward()
    return {"forward": before.get_total_flops(), "backward": after.get_total_flops()}
