"""Counters of a training step: bytes that autograd keeps for backward, and operations."""

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils.flop_counter import FlopCounterMode, flop_registry

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
        self._saved: list[weakref.ref[_Kept]] = []
        self._stack = ExitStack()
        self.num_bytes = 0
        """Bytes of the distinct storages that are kept when the context ends."""
        self.num_bytes_by_kind = dict.fromkeys(self._layers.values(), 0)
        """Kind of layer -> bytes that nothing else keeps, of all layers of that kind."""

    def _pack(self, tensor: Tensor) -> "_Kept":
        # Holds the memory, so that no address comes twice. Detached: a node that kept its own
        # output would keep itself alive.
        kept = _Kept(tensor.detach(), self._entered[-1] if self._entered else None)
        self._saved.append(weakref.ref(kept))
        return kept

    def _count(self) -> None:
        """Count what nodes of graphs still hold."""
        kinds: dict[int, str | None] = {}
        sizes: dict[int, int] = {}
        for kept in filter(None, (link() for link in self._saved)):
            is_sparse = kept.tensor.layout is torch.sparse_coo
            parts = (kept.tensor._indices(), kept.tensor._values()) if is_sparse else (kept.tensor,)
            for part in parts:
                address = _address(part)
                if address not in self._held:
                    sizes[address] = part.untyped_storage().nbytes()
                    kinds[address] = kept.kind and kinds.get(address, kept.kind)
        self.num_bytes = sum(sizes.values())
        for address, kind in kinds.items():
            if kind is not None:
                self.num_bytes_by_kind[kind] += sizes[address]

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
        self._stack.close()
        self._count()


class _Kept:
    """What a node holds, so that its end is seen."""

    def __init__(self, tensor: Tensor, kind: str | None) -> None:
        self.tensor, self.kind = tensor, kind


def kinds_of_modules(model: nn.Module) -> dict[nn.Module, str]:
    """Map modules to `linear`, `head`, `norm`, `attention`, `mlp` or `embedding`, by structure.

    An adapted layer is one linear layer, whatever it consists of. What no such module keeps (loss,
    residuals, rotary positions) belongs to none.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    head = cast(Any, model).get_output_embeddings()
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
    """Return the operations of `forward` and `backward` of a loss; to multiply and add are two."""
    before, after = FlopCounterMode(display=False), FlopCounterMode(display=False)
    before.flop_registry = after.flop_registry = flop_formulas()
    with before:
        loss: Any = forward()
    with after:
        loss.backward()
    return {"forward": before.get_total_flops(), "backward": after.get_total_flops()}


def flop_formulas() -> dict[Any, Any]:
    """Return operators -> their number of operations: torch's, and those that it does not know."""
    aten, quantized = torch.ops.aten, torch.ops.bitsandbytes
    attention = aten._scaled_dot_product_flash_attention
    backward = aten._scaled_dot_product_flash_attention_backward
    # There from bitsandbytes' first import on, which a quantised model has behind it.
    products = [
        getattr(quantized, name) for name in ("gemm_4bit", "gemv_4bit") if hasattr(quantized, name)
    ]
    return {
        **flop_registry,
        **dict.fromkeys(products, _quantized_flop),
        aten.addmm_: flop_registry[aten.addmm],
        aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[attention],
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[backward],
    }


def _quantized_flop(x: Tensor, packed: Any, shape: Any, *args: Any, **kwargs: Any) -> int:
    """(..., I) by a packed (O, I)."""
    return 2 * x.numel() * int(shape[0])
