"""Merging: the adapted columns become the base weight, and can be taken out again bit for bit.

What a merge overwrites is kept aside and copied back; nothing is ever subtracted, so no number of
merge and unmerge cycles drifts in any dtype. A quantised weight is dequantised, changed and
quantised again, and unmerging puts the original quantised object back.
"""

import copy
import warnings
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from pacatune.residency import Residency
from pacatune.residency.watching import release

__all__ = ["MergeMixin"]


_ROUNDED_AGAIN = (
    "Merging into a quantised model rounds the weight of every adapted layer again, columns that "
    "were never trained included. Serve the adapter unmerged (`pacatune export` makes it a LoRA), "
    "or write a 16-bit model with `pacatune merge`, which reports the error."
)


class MergeMixin:
    """Merge, unmerge and unload for a layer with `paca_delta`, `paca_indices` and `scaling`."""

    base_layer: nn.Module
    residency: Residency | None
    column_dim: int
    parameter_name: str
    shares_weight: bool
    _kept: list[Any]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the base weight.

        Args:
            safe_merge: Check the merged columns for NaN and infinity before anything is changed.
            adapter_names: Adapters to merge; None: the active ones.

        Raises:
            ValueError: If `safe_merge` finds a value that is not finite, or a weight is sharded.
        """
        layer = cast(Any, self)
        before = len(layer.merged_adapters)
        if self.residency is not None:
            self.residency.merging()
        try:
            for name in check_adapters_to_merge(layer, adapter_names):
                if name in layer.paca_delta:
                    self._merge_one(name, safe_merge)
                    layer.merged_adapters.append(name)
        except BaseException:
            self.unmerge_to(before)
            raise
        if self.residency is not None and not layer.merged_adapters:
            self.residency.unmerged()

    @torch.no_grad()
    def _merge_one(self, name: str, safe_merge: bool) -> None:
        layer = cast(Any, self)
        weight = self._weight_to_merge()
        _refuse_part(weight, num_dims=len(layer.dense_shape()))
        indices = layer.paca_indices[name].to(weight.device)
        originals = self._read_columns(weight, indices)
        update = self._oriented(layer.paca_delta[name].weight.to(weight.device))
        merged = torch.add(originals, update, alpha=layer.scaling[name]).to(weight.dtype)
        if safe_merge and not merged.isfinite().all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
            )
        if layer.quantization_backend is not None:
            self._kept.append(_snapshot(self.base_layer))
            weight = weight.clone()
        elif self.shares_weight:
            self._kept.append(getattr(self.base_layer, self.parameter_name))
            weight = weight.clone()
        else:
            self._kept.append((indices, originals))
        self._put_columns_(weight, indices, merged)
        if layer.quantization_backend is not None:
            warnings.warn(_ROUNDED_AGAIN, stacklevel=2)
            layer.set_base_weight(weight)
        elif self.shares_weight:  # the other module keeps the pretrained weight
            adapted = nn.Parameter(weight, requires_grad=False)
            setattr(self.base_layer, self.parameter_name, adapted)

    def _weight_to_merge(self) -> Tensor:
        """Return what is merged into: of weights that can be, the parameter itself.

        Changes of a parameter are counted, so that autograd refuses a backward pass through what
        was computed before.
        """
        layer = cast(Any, self)
        if layer.quantization_backend is not None:
            return cast(Tensor, layer.get_base_weight())
        return cast(Tensor, getattr(layer.get_base_layer(), self.parameter_name))

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again, bit for bit."""
        self.unmerge_to(0)

    @torch.no_grad()
    def unmerge_to(self, number: int) -> None:
        """Take out what was merged last, until as many adapters are merged."""
        layer = cast(Any, self)
        while len(self._kept) > number:
            kept = self._kept[-1]
            if isinstance(kept, dict):
                self.base_layer.__dict__.update(kept)
            elif isinstance(kept, nn.Parameter):
                setattr(self.base_layer, self.parameter_name, kept)
            else:
                indices, originals = kept
                weight = self._weight_to_merge()
                self._put_columns_(weight, indices.to(weight.device), originals.to(weight))
            self._kept.pop()
            del layer.merged_adapters[len(self._kept) :]
        if self.residency is not None and not layer.merged_adapters:
            self.residency.unmerged()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return W' - W of one adapter as a dense weight: (O, I), or (I, O) for Conv1D."""
        layer = cast(Any, self)
        update = layer.paca_delta[adapter].weight.detach() * layer.scaling[adapter]
        dense = self._oriented(update.new_zeros(layer.dense_shape()))
        self._put_columns_(dense, layer.paca_indices[adapter], self._oriented(update))
        return dense

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PaCA is an exact LoRA whose A selects columns, so yes."""
        return True

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer without anything of ours, merged if asked for."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if self.residency is not None:
            self.residency.close()
        release(self.base_layer)
        return self.base_layer

    def _read_columns(self, weight: Tensor, indices: Tensor) -> Tensor:
        return weight.index_select(self.column_dim, indices)

    def _put_columns_(self, weight: Tensor, indices: Tensor, columns: Tensor) -> None:
        weight.index_copy_(self.column_dim, indices, columns)

    def _oriented(self, weight: Tensor) -> Tensor:
        return weight.t() if self.column_dim == 0 else weight


def _refuse_part(weight: Tensor, *, num_dims: int) -> None:
    if hasattr(weight, "placements") or weight.dim() != num_dims:  # a DTensor, or flat, or empty
        raise ValueError(
            f"Cannot merge into a weight of shape {tuple(weight.shape)} of which each process has "
            "a part. Save the adapter and merge it in one process (`pacatune merge`)."
        )


def _snapshot(module: nn.Module) -> dict[str, Any]:
    """What a module consists of, by reference; putting it back undoes any replacement."""
    state = dict(module.__dict__)
    parameters = state.pop("_parameters")
    state["_parameters"] = parameters.copy()
    if "state" in state:  # bitsandbytes' 8-bit layers keep the quantised weight in it
        state["state"] = copy.copy(state["state"])
    return state
