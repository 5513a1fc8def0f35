"""Exact counts beside the times: what is kept for backward, and how often columns are written."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.methods import OURS
from pacatune import residency

__all__ = ["SavedByLayer", "check_bytes", "count_column_writes", "formula_bytes"]


class SavedByLayer:
    """Context that counts the bytes autograd keeps for backward, by kind of linear layer.

    Counts each storage once, and none of the model's parameters and buffers. A storage belongs to
    the layer that saved it first, unless something outside all layers keeps it as well: then the
    layer costs nothing beyond that.

    Args:
        model: Whose forward pass runs in the context.
        layers: Each counted layer -> its kind.
    """

    def __init__(self, model: nn.Module, layers: dict[nn.Module, str]) -> None:
        held = [*model.parameters(), *model.buffers()]
        self._held = {_address(tensor) for tensor in held}
        self._layers = layers
        self._current: str | None = None
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
            num_bytes, kind = tensor.untyped_storage().nbytes(), self._current
            if address in self._saved and kind is not None:
                kind = self._saved[address][1]
            self._saved[address] = num_bytes, kind
        return tensor.detach()  # holds the memory, so that no address comes twice

    def _enter_layer(self, module: nn.Module, *args: Any) -> None:
        self._current = self._layers[module]

    def _leave_layer(self, *args: Any) -> None:
        self._current = None

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


def formula_bytes(
    layers: dict[nn.Module, str], num_tokens: int, dtype: torch.dtype
) -> dict[str, int]:
    """Return what PaCA has to keep: N * R elements per layer, by kind of layer.

    Args:
        layers: Each of our layers -> its kind.
        num_tokens: N.
        dtype: Of the activations.
    """
    totals = dict.fromkeys(layers.values(), 0)
    for layer, kind in layers.items():
        (rank,) = layer.r.values()
        totals[kind] += num_tokens * rank * dtype.itemsize
    return totals


@contextmanager
def count_column_writes() -> Iterator[Callable[[], int]]:
    """Count how often columns are written into a weight, restoring included."""
    write, done = residency._put_columns_, []

    def counting(*args: Any) -> None:
        # A mock would keep the arguments; a held alias of a weight forbids writing it.
        done.append(None)
        write(*args)

    with patch.object(residency, "_put_columns_", counting):
        yield lambda: len(done)


def check_bytes(rows: list[dict[str, Any]]) -> None:
    """Add what each method keeps beyond the frozen model; refuse a PaCA that misses its formula.

    Args:
        rows: With the counts of each setting and method; those of `frozen` may be missing,
            and PaCA's formula where it does not apply.

    Raises:
        RuntimeError: If PaCA keeps more, or less, than N * R elements per layer.
    """
    frozen = {row["setting"]: row["saved_bytes"] for row in rows if row["method"] == "frozen"}
    for row in rows:
        beyond = None
        if row["setting"] in frozen:
            beyond = row["saved_bytes"] - frozen[row["setting"]]
            row["saved_bytes_beyond_frozen"] = beyond
        if row["method"] != OURS or "formula_bytes_by_layer" not in row:
            continue  # compiled graphs decide themselves what to keep
        kept, formula = row["saved_bytes_by_layer"], row["formula_bytes_by_layer"]
        if kept != formula or beyond not in (None, sum(formula.values())):
            raise RuntimeError(
                f"{row['setting']}: paca keeps {kept} bytes in its layers, and {beyond} beyond the "
                f"frozen model; N * R * itemsize gives {formula}, so something else is saved."
            )


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
