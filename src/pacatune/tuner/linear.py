"""The adapted linear layer, and the choice between two equal ways to compute it.

    resident   the columns are written into the weight (residency.py), then one GEMM
    additive   x W^T + x[..., indices] (scaling * delta)^T, the weight left as it is

Resident is the rule. Additive serves whatever must not or need not write: few tokens in float32 on
a CPU, tied weights, weights whose memory somebody else holds; and, on top of the base layer's own
forward, several active adapters, mixed batches, torch.compile, hooks, quantised, sharded and
offloaded weights. The two differ by rounding only.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from pacatune.functional.gated import Elementwise, apply_paca_gated
from pacatune.functional.linear import apply_paca_linear, autocast
from pacatune.tuner.additive import AdditiveLayer, has_hooks, is_traced

__all__ = ["Linear"]

# A training step of fewer tokens runs faster with two thin GEMMs more than with the columns written
# into the weight, where thin GEMMs are cheap: in float32 on a CPU (benchmarks/step.py).
_FEW_TOKENS = 64

# What the hand-written gradients take beside x: weight, delta, indices, scaling, bias, is_resident,
# look_again.
_Call = tuple[Tensor, Tensor, Tensor, float, Tensor | None, bool, Callable[[], bool]]


class Linear(AdditiveLayer):
    """An adapted nn.Linear, Conv1D (transformers) or quantised linear layer."""

    def _fast_forward(self, x: Tensor) -> Tensor | None:
        """Apply one adapter by the hand-written gradients; None where the base layer must run."""
        call = self._prepare(x)
        if call is None:
            return None
        weight, delta, indices, scaling, bias, is_resident, look_again = call
        if is_resident and not torch.is_grad_enabled():
            return F.linear(x, weight, bias)
        if torch._C._is_any_autocast_enabled():
            x = autocast(x)
        return apply_paca_linear(x, weight, delta, indices, scaling, bias, is_resident, look_again)

    def _prepare(self, x: Tensor) -> _Call | None:
        """Return what the hand-written gradients take beside `x`; None where they cannot serve."""
        update, residency = self._single_update(), self.residency
        if update is None or residency is None:
            return None
        if self._modules["base_layer"].__dict__["_parameters"] is not residency.parameters:
            return None
        delta, indices, scaling = update
        is_small = torch.is_grad_enabled() and _is_small(x)
        prepare = residency.holds_or_restore if is_small else residency.write
        is_resident = prepare(delta, indices, scaling)
        weight = residency.weight if is_resident else residency.find_weight()
        if weight is None:
            return None
        bias = dict.get(residency.parameters, "bias")
        look_again = partial(prepare, delta, indices, scaling)
        return weight, delta, indices, scaling, bias, is_resident, look_again

    def forward_of_product(
        self, gate: Tensor, up: Tensor, activation: Elementwise
    ) -> Tensor | None:
        """Apply the layer to act(gate) * up, of which nothing is then kept (lean MLPs).

        Args:
            gate: (..., I).
            up: (..., I).
            activation: act.

        Returns:
            (..., O); None where the layer must be called with the product.
        """
        if self._disable_adapters or self.merged_adapters or is_traced():
            return None
        if has_hooks(self.__dict__) or gate.dtype != up.dtype or autocast(up).dtype != up.dtype:
            return None
        call = self._prepare(up)
        return None if call is None else apply_paca_gated(gate, up, *call, activation)

    def _update(self, x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        columns = x.index_select(-1, self.paca_indices[name]).to(dtype)
        return cast(Tensor, self.paca_delta[name](columns, self.scaling[name]))

    def _base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer on the pretrained weight."""
        if not is_traced():
            self.restore()
        elif self.residency is not None and self.residency.is_written:
            # A traced graph cannot restore, so it undoes the columns in a copy, until the optimiser
            # has stepped twice or somebody looks at the weight.
            weight = self.residency.pretrained_weight()
            return F.linear(x, weight, cast("Tensor | None", self.base_layer.bias))
        return super()._base_forward(x, *args, **kwargs)


def _is_small(x: Tensor) -> bool:
    return x.numel() < _FEW_TOKENS * x.shape[-1] and x.dtype is torch.float32 and x.is_cpu
