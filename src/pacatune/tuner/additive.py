"""What every adapted layer with one input does around its update: hooks, merging, mixed batches.

By linearity an adapted layer is its base layer plus what its trained columns add, so it can run
on top of whatever the base layer's own forward does. That is the general way, and takes any number
of adapters. One active adapter on a base layer without hooks has a faster one, which each kind of
layer writes for itself.
"""

from typing import Any, cast

import torch
from torch import Tensor

from pacatune.ops.columns import Update
from pacatune.ops.tracing import is_traced
from pacatune.tuner.compat import quantization_extra_repr
from pacatune.tuner.layer import Delta, PacaLayer


class AdditiveLayer(PacaLayer):
    """A PacaLayer whose output is that of its base layer plus one term for each adapter."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer with its active adapters.

        Args:
            x: Input of the base layer.
            *args: Passed to the base layer.
            **kwargs: Passed to the base layer, except `adapter_names`: one adapter name (or
                "__base__") per row of the batch, for inference.
        """
        if not (
            args or kwargs or self._disable_adapters or self.merged_adapters or self._is_traced()
        ):
            result = self._fast_forward(x)
            if result is not None:
                return result
        return self._general_forward(x, *args, **kwargs)

    _is_traced = staticmethod(is_traced)  # hand-written gradients are then out of the question

    def _fast_forward(self, x: Tensor) -> Tensor | None:
        """Apply one adapter by hand-written gradients; None where the base layer must run."""
        return None

    def _update(self, x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        """Return what one adapter adds to the output, in `dtype`."""
        raise NotImplementedError

    def _single_update(self) -> Update | None:
        """Return what `update_of` does, if one adapter is active and no hook needs the base."""
        name: Any = self._active_adapter
        if type(name) is list:
            if len(name) != 1:
                return None
            name = name[0]
        modules: dict[str, Any] = self.__dict__["_modules"]  # nn.Module's own look-up is slow
        holder = modules["paca_delta"]._modules.get(name)
        # FSDP may wrap or shard holders alone.
        if type(holder) is not Delta or has_hooks(modules["base_layer"].__dict__):
            return None
        parameters = holder._parameters
        delta = parameters.get("weight")
        if delta is None:  # a replica of nn.DataParallel has plain tensors in its parameters' place
            return None
        indices, mix = modules["paca_indices"]._buffers[name], parameters.get("mix")
        return Update(delta, indices, self.scaling[name], mix)

    def _general_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if self.merged_adapters:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        if self._disable_adapters:
            return self._base_forward(x, *args, **kwargs)
        active = self._active_adapter
        names = [active] if isinstance(active, str) else active
        return self._additive_forward(x, names, *args, **kwargs)

    def _additive_forward(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Add any number of adapters to what the base layer returns."""
        result = self._base_forward(x, *args, **kwargs)
        for name in names:
            if name in self.paca_delta:
                result = self._with_update(result, x, name)
        return result

    def _with_update(self, result: Tensor, x: Tensor, name: str) -> Tensor:
        """Return the output with one more adapter."""
        return result + self._update(x, name, result.dtype)

    def _base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer on the pretrained weight."""
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        return cast(Tensor, result)

    def _mixed_batch_forward(
        self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any
    ) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged_adapters:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )
        result = self._base_forward(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name in self.paca_delta:
                rows = [row for row, row_name in enumerate(adapter_names) if row_name == name]
                result[rows] = self._with_update(result[rows], x[rows], name)
        return result

    def extra_repr(self) -> str:
        """Name the quantisation of the base layer, as PEFT's layers do."""
        return quantization_extra_repr(self)


def has_hooks(base: dict[str, Any]) -> bool:
    """Whether calling the base layer does more than its forward (hooks, accelerate's offload)."""
    return bool(
        base["_forward_hooks"]
        or base["_forward_pre_hooks"]
        or base["_backward_hooks"]
        or base["_backward_pre_hooks"]
        or "forward" in base
    )
