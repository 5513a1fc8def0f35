"""Follows every storage of a training step from its allocation to its end, by what it is for.

Works on fake tensors, where storages have sizes and no memory, and on real ones alike. What a
kernel allocates for itself and frees before it returns is not seen.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode

Category = Literal[
    "weights", "adapter", "gradients", "optimizer", "gathered", "activations", "temporaries"
]
CATEGORIES: tuple[Category, ...] = get_args(Category)
_LINEAR = "linear layers"


@dataclass(slots=True)
class _Record:
    """One live storage."""

    num_bytes: int
    category: Category
    owner: str
    link: Any
    """Weak reference that ends the record with the storage."""


class StorageTracker(TorchDispatchMode):
    """Context in which every new storage is counted while it lives.

    A storage is a temporary until somebody says otherwise: autograd saves it (an activation), it
    becomes a parameter's gradient, or `hold` names it. `shares` maps a category to the share of its
    bytes that this device holds, where it is not all. `peak_bytes` is the largest sum so far,
    `by_category` its parts, `peak_phase` when it was.
    """

    def __init__(self, shares: dict[Category, float] | None = None) -> None:
        super().__init__()
        self.shares = shares or {}
        self.phase = "setup"
        self._records: dict[int, _Record] = {}
        self._now: Counter[Category] = Counter()
        self.num_bytes = 0
        """Bytes of all storages that live now."""
        self._owners: list[str] = []
        self._stack = ExitStack()
        self.reset_peak()

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak_bytes, self.by_category, self.peak_phase = 0, self._now.copy(), self.phase
        self._note_peak()

    def hold(self, tensors: Iterable[Tensor], category: Category) -> None:
        """Say what some tensors' storages are for; counts those that were not seen yet."""
        for tensor in tensors:
            self._see(tensor)
            self._move(self._records[storage_key(tensor)], category)

    def owned_by_module(self, category: Category) -> dict[str, int]:
        """Return the live bytes of a category by the kind of module that saved or made them."""
        owners: Counter[str] = Counter()
        for record in self._records.values():
            if record.category == category:
                owners[record.owner] += record.num_bytes
        return dict(owners.most_common())

    def settle_activations(self, *results: Tensor) -> None:
        """Take all temporaries but a forward pass's results for activations.

        What still lives when it has ended is kept for backward, in a closure of checkpointing if
        not by autograd.
        """
        kept = {storage_key(tensor) for tensor in results}
        for key, record in self._records.items():
            if record.category == "temporaries" and key not in kept and record.owner:
                self._move(record, "activations")

    def watch_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take what becomes the gradient of a parameter for one, until the context ends."""
        for parameter in parameters:
            handle = parameter.register_post_accumulate_grad_hook(
                lambda p: self.hold([p.grad], "gradients")
            )
            self._stack.callback(handle.remove)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, list | tuple) else (result,):
            if isinstance(part, Tensor):
                self._see(part)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._records:
            return
        link = weakref.ref(storage, lambda _: self._end(key))
        owner = self._owners[-1] if self._owners else ""
        self._records[key] = _Record(storage.nbytes(), "temporaries", owner, link)
        self._add("temporaries", storage.nbytes())
        self._note_peak()

    def _end(self, key: int) -> None:
        record = self._records.pop(key)
        self._add(record.category, -record.num_bytes)

    def _move(self, record: _Record, category: Category) -> None:
        if record.category != category:
            self._add(record.category, -record.num_bytes)
            record.category = category
            self._add(category, record.num_bytes)
            self._note_peak()

    def _add(self, category: Category, num_bytes: int) -> None:
        held = round(num_bytes * self.shares.get(category, 1.0))
        self._now[category] += held
        self.num_bytes += held

    def _note_peak(self) -> None:
        if self.num_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_phase = self.num_bytes, self.phase
            self.by_category = self._now.copy()

    def _pack(self, tensor: Tensor) -> Tensor:
        record = self._records.get(storage_key(tensor))
        if record is not None and record.category == "temporaries":
            record.owner = self._owners[-1] if self._owners else "loss"
            self._move(record, "activations")
        # Detached: a node that kept its own output would keep itself alive.
        return tensor.detach()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._owners and self._owners[-1] == _LINEAR:
            self._owners.append(_LINEAR)  # what is inside an adapted layer belongs to it
        elif isinstance(module, nn.Linear | BaseTunerLayer):
            self._owners.append(_LINEAR)
        else:
            self._owners.append(type(module).__name__)

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        self._owners.pop()

    def __enter__(self) -> "StorageTracker":
        saved = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept)
        self._stack.enter_context(saved)
        self._stack.callback(hooks.register_module_forward_pre_hook(self._enter).remove)
        leave = hooks.register_module_forward_hook(self._leave, always_call=True)
        self._stack.callback(leave.remove)
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()


def storage_key(tensor: Tensor) -> int:
    """Return what tells a storage that lives from all others, also where it has no memory."""
    return int(tensor.untyped_storage()._cdata)
