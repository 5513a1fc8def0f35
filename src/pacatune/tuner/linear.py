"""The adapted linear layer, and the choice between two equal ways to compute it.

    resident   the columns are written into the weight (residency/), then one GEMM
    additive   x W^T + x[..., indices] (W' - W)[:, indices]^T, the weight left as it is; in 16
               bits, where the sum would be rounded twice, a temporary W'

Training is resident, evaluation additive unless the columns are there already. Additive also serves
whatever must not write: tied weights, weights whose memory somebody else holds; and, on top of the
base layer's own forward, several active adapters, mixed batches, tracers, hooks, quantised and
offloaded weights. The two differ by the rounding of their products only. Compiled graphs call
operators that choose when they run (`compiled.py`).
"""

import threading
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pacatune.ops.columns import Update
from pacatune.ops.linear import (
    Call,
    Elementwise,
    add_columns,
    apply_paca_linear,
    linear_beside,
)
from pacatune.ops.products import autocast
from pacatune.ops.tracing import is_exported, is_traced
from pacatune.ops.whole import is_whole
from pacatune.residency import Pass, Residency
from pacatune.residency.reading import read
from pacatune.residency.watching import WeightParameter
from pacatune.tuner.additive import AdditiveLayer, has_hooks
from pacatune.tuner.compiled import compiled_linear, handle_of


class Linear(AdditiveLayer):
    """An adapted nn.Linear, Conv1D (transformers) or quantised linear layer."""

    def _attach(self) -> None:
        super()._attach()
        self.handle = handle_of(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PaCA is an exact LoRA whose A selects columns, so yes; PEFT converts no other layers."""
        return True

    def why_additive(self) -> str | None:
        """Say why the columns are not in the base weight in training; None if they are."""
        update, residency = self._prepare(), self.residency
        if residency is None or self.merged_adapters or self._disable_adapters:
            return super().why_additive()
        if update is not None:
            if not update.delta.requires_grad:
                return "its update is not trained"
            return residency.obstacle(update)
        if has_hooks(self.base_layer.__dict__):
            return "its base layer has hooks, or another forward (offloading, patches)"
        if len(self.active_adapters) != 1:
            return super().why_additive()
        return "its update is sharded or wrapped by itself"

    def _additive_forward(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        update = self._single_update()
        if update is not None and self._asks_when_it_runs(args, kwargs):
            return self._compiled(x, update)
        return super()._additive_forward(x, names, *args, **kwargs)

    def _asks_when_it_runs(self, args: Any, kwargs: Any) -> bool:
        """Whether a compiled graph needs operators here, which ask the residency for the weight.

        What only evaluates is better off without, as long as nothing was ever written.
        """
        residency = self.residency
        return (
            torch.compiler.is_dynamo_compiling()
            and residency is not None
            and residency.forbidden is None
            and (torch.is_grad_enabled() or residency.was_written)
            and not (args or kwargs or is_exported())
        )

    def _compiled(self, x: Tensor, update: Update | None) -> Tensor:
        bias = cast("Tensor | None", self.base_layer.bias)
        return compiled_linear(autocast(x), update, bias, self.handle, self.out_features)

    def _fast_forward(self, x: Tensor) -> Tensor | None:
        """Apply one adapter by the hand-written gradients; None where the base layer must run."""
        update, residency = self._prepare(), self.residency
        if update is None or residency is None:
            return None
        bias = dict.get(residency.parameters, "bias")  # type: ignore[arg-type]
        if not torch.is_grad_enabled():
            writes = residency.owner is not None and residency.owner == threading.get_ident()
            evaluate = partial(_evaluate, x, update, bias)
            return read(residency, evaluate, update, writes=writes)
        if update.delta.is_inference():  # nothing is known of its changes
            return None
        if torch._C._is_any_autocast_enabled():
            x = autocast(x)
        return _train(residency, x, update, bias)

    def _prepare(self) -> Update | None:
        """Return what the hand-written gradients are of; None where they cannot serve."""
        residency, base = self.residency, self._modules["base_layer"].__dict__
        if residency is None or base["_parameters"] is not residency.parameters:
            return None
        return self._single_update()

    def forward_of_product(
        self, gate: Tensor, up: Tensor, activation: Elementwise
    ) -> Tensor | None:
        """Apply the layer to act(gate) * up, of which nothing is then kept (lean MLPs).

        Returns (..., O), or None where the layer must be called with the product.
        """
        if self._disable_adapters or self.merged_adapters or is_traced():
            return None
        if has_hooks(self.__dict__) or gate.dtype != up.dtype or autocast(up).dtype != up.dtype:
            return None
        update, residency = self._prepare(), self.residency
        if update is None or residency is None:
            return None
        if not torch.is_grad_enabled() or update.delta.is_inference():
            return None
        bias = dict.get(residency.parameters, "bias")  # type: ignore[arg-type]
        return _train(residency, up, update, bias, activation, gate)

    def _update(self, x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        columns = x.index_select(-1, self.paca_indices[name]).to(dtype)
        return cast(Tensor, self.paca_delta[name](columns, self.scaling[name]))

    def _with_update(self, result: Tensor, x: Tensor, name: str) -> Tensor:
        weight = self._weight_in_16_bits(result.dtype)
        if weight is None:
            return super()._with_update(result, x, name)
        update = self.update_of(name)

        def apply(columns: Tensor, delta: Tensor) -> Tensor:
            return add_columns(result, columns, weight, update._replace(delta=delta, mix=None))

        return cast(Tensor, self.paca_delta[name](x.index_select(-1, update.indices), None, apply))

    def _weight_in_16_bits(self, dtype: torch.dtype) -> Tensor | None:
        """Return the pretrained weight if it is there; None where W' is not rounded to 16 bits."""
        base = self.base_layer
        is_known = self.residency is not None or type(base) is Conv1D
        if dtype.itemsize > 2 or not is_known:
            return None
        weight: Any = base.weight
        is_plain = type(weight) in (nn.Parameter, WeightParameter, Tensor)
        return self.layout.matrix(weight) if is_plain and is_whole(weight, 2) else None

    def _base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer on the pretrained weight: whoever reads it through its module does."""
        residency = self.residency
        if residency is not None and is_exported():
            if torch.compiler.is_dynamo_compiling():
                raise RuntimeError(
                    "A graph that torch.export makes with `strict=True` would read the weights "
                    "while columns are in them; export the model with `strict=False`."
                )
            residency.note_capture()
        if self._asks_when_it_runs(args, kwargs) and not has_hooks(self.base_layer.__dict__):
            return self._compiled(x, None)
        if residency is not None and residency.is_written and is_traced():
            # A traced graph cannot restore, so it undoes the columns in a copy, until the optimiser
            # has stepped twice or somebody looks at the weight.
            weight = residency.pretrained_weight()
            return F.linear(x, weight, cast("Tensor | None", self.base_layer.bias))
        return super()._base_forward(x, *args, **kwargs)


def _train(
    residency: Residency,
    x: Tensor,
    update: Update,
    bias: Tensor | None,
    activation: Elementwise | None = None,
    gate: Tensor | None = None,
) -> Tensor | None:
    """Apply the layer by its hand-written gradients; None where there is no plain weight."""
    delta, indices, scaling, mix = update
    if residency.forbidden is None:
        own = Pass(residency, update, activation=activation)
        return own.forward(partial(apply_paca_linear, x, delta, mix, indices, bias, gate, own))
    weight = residency.find_weight()
    if weight is None:
        return None
    call = Call(scaling, activation)
    return apply_paca_linear(x, delta, mix, indices, bias, gate, call, weight, False)


def _evaluate(
    x: Tensor, update: Update, bias: Tensor | None, weight: Tensor, is_resident: bool
) -> Tensor:
    """Apply the layer without gradients to a weight that holds the columns or not."""
    if is_resident:
        return F.linear(x, weight, bias)
    return linear_beside(autocast(x), weight, update, bias)
