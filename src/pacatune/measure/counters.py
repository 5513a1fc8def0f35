"""Counters of a training step: bytes that autograd keeps for backward, and operations."""

import math
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

# Words in the name of a module's class -> kind; linear layers and embeddings are told by type.
_WORDS = {"norm": "norm", "attention": "attention", "mlp": "mlp", "gated": "mlp"}


class SavedBytes:
    """Context that counts the bytes autograd keeps for backward, by kind of layer if asked.

    Counts each storage once, however many views of it are saved, and leaves out the storages of
    the model's parameters and buffers, which exist anyway. What a checkpointed block recomputes
    is not kept, so only its inputs count; nor is what belongs to a graph that is dropped before the
    context ends, as PEFT's DoRA drops that of its norms.

        with SavedBytes(model) as saved:
            loss = model(**batch).loss
        loss.backward()
        saved.num_bytes

    `layers` maps each layer to count apart to its kind. A storage belongs to the layer that saved
    it first, the innermost one where layers are nested, unless something outside all layers keeps
    it as well: then the layer costs nothing beyond that.
    """

    def __init__(self, model: nn.Module, layers: Mapping[nn.Module, str] | None = None) -> None:
        self._held = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._layers = dict(layers or {})
        self._entered: list[str] = []
        self._saved: dict[int, _Storage] = {}
        self._is_counting = True
        self._stack = ExitStack()

    @property
    def num_bytes(self) -> int:
        """Bytes of the distinct storages saved so far."""
        return sum(storage.num_bytes for storage in self._saved.values())

    @property
    def num_bytes_by_kind(self) -> dict[str, int]:
        """Kind of layer -> bytes that nothing else keeps, of all layers of that kind."""
        totals = dict.fromkeys(self._layers.values(), 0)
        for storage in self._saved.values():
            if storage.kind is not None:
                totals[storage.kind] += storage.num_bytes
        return totals

    def _pack(self, tensor: Tensor) -> "_Kept":
        # Holds the memory, so that no address comes twice. Detached: a node that kept its own
        # output would keep itself alive.
        kept = _Kept(tensor.detach())
        is_sparse = tensor.layout is torch.sparse_coo
        for part in (tensor._indices(), tensor._values()) if is_sparse else (tensor,):
            if _address(part) not in self._held:
                self._note(part)
                weakref.finalize(kept, self._drop, _address(part))
        return kept

    def _note(self, tensor: Tensor) -> None:
        kind = self._entered[-1] if self._entered else None
        address = _address(tensor)
        storage = self._saved.get(address)
        if storage is None:
            storage = _Storage(tensor.untyped_storage().nbytes(), kind)
            self._saved[address] = storage
        elif kind is None:
            storage.kind = None
        storage.num_kept += 1

    def _drop(self, address: int) -> None:
        """Forget what a dropped graph kept alone; after the context, backward drops everything."""
        if self._is_counting:
            storage = self._saved[address]
            storage.num_kept -= 1
            if storage.num_kept == 0:
                del self._saved[address]

    def _enter(self, module: nn.Module, *args: Any) -> None:
        if module in self._layers:
            self._entered.append(self._layers[module])

    def _leave(self, module: nn.Module, *args: Any) -> None:
        if module in self._layers:
            self._entered.pop()

    def __enter__(self) -> "SavedBytes":
        if self._layers:
            # Of all modules: layers with hooks of their own may keep more, as lean ones do.
            self._stack.callback(hooks.register_module_forward_pre_hook(self._enter).remove)
            leave = hooks.register_module_forward_hook(self._leave, always_call=True)
            self._stack.callback(leave.remove)
        self._stack.enter_context(
            torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)
        )
        return self

    def __exit__(self, *error: Any) -> None:
        self._is_counting = False
        self._stack.close()


@dataclass
class _Storage:
    num_bytes: int
    kind: str | None
    num_kept: int = 0
    """Tensors on it that nodes of graphs hold."""


class _Kept:
    """What a node holds, so that its end is seen."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kinds_of_modules(model: nn.Module) -> dict[nn.Module, str]:
    """Map modules to `linear`, `head`, `norm`, `attention`, `mlp` or `embedding`, by structure.

    An adapted layer is one linear layer, whatever it consists of. What no such module keeps (loss,
    residuals, rotary positions) belongs to none.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    kinds: dict[nn.Module, str] = {}
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside:
            continue
        if isinstance(module, (nn.Linear, Conv1D, BaseTunerLayer)):
            kinds[module] = "head" if module is head else "linear"
            inside.update(module.modules())
        elif isinstance(module, nn.Embedding):
            kinds[module] = "embedding"
        else:
            name = type(module).__name__.lower()
            kind = next((kind for word, kind in _WORDS.items() if word in name), None)
            if kind is not None:
                kinds[module] = kind
    return kinds


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def count_flops(forward: Callable[[], Tensor]) -> dict[str, int]:
    """Return `forward_flops` and `backward_flops` of a loss; multiplying and adding are two."""
    with FlopCounterMode(display=False, custom_mapping=formulas_beside_torchs()) as before:
        loss: Any = forward()
    with FlopCounterMode(display=False, custom_mapping=formulas_beside_torchs()) as after:
        loss.backward()
    return {"forward_flops": before.get_total_flops(), "backward_flops": after.get_total_flops()}


def formulas_beside_torchs() -> dict[Any, Any]:
    """Return the products that torch's counter does not know -> their number of operations."""
    aten, quantized = torch.ops.aten, torch.ops.bitsandbytes
    # There from bitsandbytes' first import on, which a quantised model has behind it.
    products = [
        getattr(quantized, name) for name in ("gemm_4bit", "gemv_4bit") if hasattr(quantized, name)
    ]
    return dict.fromkeys(products, _quantized_flop) | {
        aten.addmm_: _addmm_flop,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
    }


# Each takes shapes in place of the tensors that the operation takes.
def _addmm_flop(self: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """In place: (M, K) by (K, N), as the additive form of PaCA adds what the columns give."""
    return int(2 * a[0] * a[1] * b[1])


def _quantized_flop(x: Any, packed: Any, shape: Any, *args: Any, **kwargs: Any) -> int:
    """(..., I) by a packed (O, I)."""
    return 2 * int(math.prod(x)) * int(shape[0])


def _attention_flop(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward_flop(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))
