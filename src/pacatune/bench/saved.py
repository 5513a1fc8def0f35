"""What autograd keeps for backward, by kind of module."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SavedByLayer", "kinds_of_modules"]

# Words in the name of a module's class -> kind; linear layers and embeddings are told by type.
_WORDS = {"norm": "norm", "attention": "attention", "mlp": "mlp", "gated": "mlp"}


class SavedByLayer:
    """Context that counts the bytes autograd keeps for backward, by kind of layer.

    Counts each storage once, and none of the model's parameters and buffers. A storage belongs to
    the layer that saved it first, the innermost one where layers are nested, unless something
    outside all layers keeps it as well: then the layer costs nothing beyond that.

    Args:
        model: Whose forward pass runs in the context.
        layers: Each counted layer -> its kind.
    """

    def __init__(self, model: nn.Module, layers: dict[nn.Module, str]) -> None:
        held = [*model.parameters(), *model.buffers()]
        self._held = {_address(tensor) for tensor in held}
        self._layers = layers
        self._entered: list[str] = []
        self._saved: dict[int, tuple[int, str | None]] = {}
        self._stack = ExitStack()

    @property
    def num_bytes(self) -> int:
        """Bytes of all distinct storages."""
        return sum(num_bytes for num_bytes, _ in self._saved.values())

    @property
    def num_bytes_by_kind(self) -> dict[str, int]:
        """Kind of layer -> bytes that nothing else keeps, of all layers of that kind."""
        totals = dict.fromkeys(self._layers.values(), 0)
        for num_bytes, kind in self._saved.values():
            if kind is not None:
                totals[kind] += num_bytes
        return totals

    def _pack(self, tensor: Tensor) -> Tensor:
        address = _address(tensor)
        if address not in self._held:
            num_bytes = tensor.untyped_storage().nbytes()
            kind = self._entered[-1] if self._entered else None
            if address in self._saved and kind is not None:
                kind = self._saved[address][1]
            self._saved[address] = num_bytes, kind
        return tensor.detach()  # holds the memory, so that no address comes twice

    def _enter_layer(self, module: nn.Module, *args: Any) -> None:
        self._entered.append(self._layers[module])

    def _leave_layer(self, *args: Any) -> None:
        self._entered.pop()

    def __enter__(self) -> "SavedByLayer":
        for module in self._layers:
            self._stack.callback(module.register_forward_pre_hook(self._enter_layer).remove)
            self._stack.callback(module.register_forward_hook(self._leave_layer).remove)
        self._stack.enter_context(
            torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept)
        )
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


def kinds_of_modules(model: nn.Module) -> dict[nn.Module, str]:
    """Map modules to `linear`, `head`, `norm`, `attention`, `mlp` or `embedding`, by structure.

    An adapted layer is one linear layer, whatever it consists of. What no such module keeps (loss,
    residuals, rotary positions) belongs to none.

    Args:
        model: With or without adapters.
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
