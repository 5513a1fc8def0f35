"""The adapted linear layer, and the choice between two equal ways to compute it.

    resident   the columns are written into the weight (residency.py), then one GEMM
    additive   x W^T + x[..., indices] (scaling * delta)^T, the weight left as it is

Resident is the rule. Additive serves whatever must not or need not write: few tokens in float32 on
a CPU, tied weights, weights whose memory somebody else holds; and, on top of the base layer's own
forward, several active adapters, mixed batches, torch.compile, hooks, quantised, sharded and
offloaded weights. The two differ by rounding only.
"""

from functools import partial
from typing import Any, cast

import torch
from peft.utils.quantization_utils import quantization_extra_repr
from torch import Tensor
from torch.nn import functional as F

from pacatune.functional.linear import apply_paca_linear, autocast
from pacatune.tuner.layer import Delta, PacaLayer

__all__ = ["Linear"]

# A training step of fewer tokens runs faster with two thin GEMMs more than with the columns written
# into the weight, where thin GEMMs are cheap: in float32 on a CPU (benchmarks/step.py).
_FEW_TOKENS = 64


class Linear(PacaLayer):
    """An adapted nn.Linear, Conv1D (transformers) or quantised linear layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer with its active adapters: (..., I) -> (..., O).

        Args:
            x: Input of the base layer.
            *args: Passed to the base layer.
            **kwargs: Passed to the base layer, except `adapter_names`: one adapter name (or
                "__base__") per row of the batch, for inference.
        """
        if not (args or kwargs or self._disable_adapters or self.merged_adapters or _is_traced()):
            result = self._fast_forward(x)
            if result is not None:
                return result
        return self._general_forward(x, *args, **kwargs)

    def _fast_forward(self, x: Tensor) -> Tensor | None:
        """Apply one adapter by the hand-written gradients; None where the base layer must run."""
        name: Any = self._active_adapter
        if type(name) is list:
            if len(name) != 1:
                return None
            name = name[0]
        residency = self.residency
        modules: dict[str, Any] = self.__dict__["_modules"]  # nn.Module's own look-up is slow
        holder = modules["paca_delta"]._modules.get(name)
        if residency is None or type(holder) is not Delta:  # FSDP may wrap or shard holders alone
            return None
        base = modules["base_layer"].__dict__
        if base["_parameters"] is not residency.parameters or _has_hooks(base):
            return None
        delta: Any = holder._parameters["weight"]
        indices = modules["paca_indices"]._buffers[name]
        scaling = self.scaling[name]
        grad_enabled = torch.is_grad_enabled()
        prepare = residency.holds_or_restore if grad_enabled and _is_small(x) else residency.write
        is_resident = prepare(delta, indices, scaling)
        weight = residency.weight if is_resident else residency.find_weight()
        if weight is None:
            return None
        bias = dict.get(residency.parameters, "bias")
        if is_resident and not grad_enabled:
            return F.linear(x, weight, bias)
        if torch._C._is_any_autocast_enabled():
            x = autocast(x)
        look_again = partial(prepare, delta, indices, scaling)
        return apply_paca_linear(x, weight, delta, indices, scaling, bias, is_resident, look_again)

    def _general_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if self._disable_adapters or self.merged_adapters:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        active = self._active_adapter
        names = [active] if isinstance(active, str) else active
        return self._additive_forward(x, names, *args, **kwargs)

    def _additive_forward(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Add any number of adapters to what the base layer returns."""
        result = self._base_forward(x, *args, **kwargs)
        for name in names:
            if name in self.paca_delta:
                columns = x.index_select(-1, self.paca_indices[name]).to(result.dtype)
                result = result + self.paca_delta[name](columns, self.scaling[name])
        return result

    def _base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer on the pretrained weight."""
        if not _is_traced():
            self.restore()
        elif self.residency is not None and self.residency.is_written:
            # A traced graph cannot restore, so it undoes the columns in a copy, until the optimiser
            # has stepped twice or somebody looks at the weight.
            weight = self.residency.pretrained_weight()
            return F.linear(x, weight, cast("Tensor | None", self.base_layer.bias))
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
                columns = x[rows].index_select(-1, self.paca_indices[name]).to(result.dtype)
                result[rows] += self.paca_delta[name](columns, self.scaling[name])
        return result

    def extra_repr(self) -> str:
        """Name the quantisation of the base layer, as PEFT's layers do."""
        return str(quantization_extra_repr(self))

    def __repr__(self) -> str:
        return "paca." + super().__repr__()


def _has_hooks(base: dict[str, Any]) -> bool:
    """Whether calling the base layer does more than its forward (hooks, accelerate's offload)."""
    return bool(
        base["_forward_hooks"]
        or base["_forward_pre_hooks"]
        or base["_backward_hooks"]
        or base["_backward_pre_hooks"]
        or "forward" in base
    )


def _is_traced() -> bool:
    """Whether torch.compile or a torch.func transform is at work: then plain operations only."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _is_small(x: Tensor) -> bool:
    return x.numel() < _FEW_TOKENS * x.shape[-1] and x.dtype is torch.float32 and x.is_cpu
