"""A gated product and the PaCA layer that follows it, in one: nothing of the product is kept.

    h = act(gate) * up        y = h W'^T + b        d(delta) = scaling * dy^T h[..., indices]

h is needed for the gradient of delta only, and of it R columns, which two columns each of gate and
up give again. Kept is what the product keeps anyway: gate and up, 2 I elements per token.
"""

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pacatune.ops.linear import (
    Source,
    add_columns_,
    column_update,
    grad_delta,
    grad_x,
    owned,
)
from pacatune.ops.row_groups import distinct_columns, held_indices, hold_indices, select

__all__ = ["Elementwise", "apply_paca_gated"]


class Elementwise(Protocol):
    """An activation: `pacatune.lean.gated.Activation` is one."""

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return act(gate) * up, a tensor of its own."""

    def product_gradients(self, gh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of gate and up from that of their product."""

    def product_columns(self, gate: Tensor, up: Tensor, indices: Tensor) -> Tensor:
        """Return the (..., R) columns of act(gate) * up."""

    def owned_product_gradients(
        self, gh: Tensor, gate: Tensor, up: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the same; may overwrite the gradient of the product, and what can be made anew."""


class _PacaGated(torch.autograd.Function):
    """See `apply_paca_gated`."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        weight: Tensor,
        delta: Tensor,
        indices: Tensor,
        scaling: float,
        bias: Tensor | None,
        is_resident: bool,
        source: Source | None,
        activation: Elementwise,
    ) -> Tensor:
        ctx.call = scaling, is_resident, source, activation
        hold_indices(ctx, indices)
        ctx.save_for_backward(gate, up, weight if source is None else None, delta, indices)
        h = activation.product(gate, up)
        y = owned(F.linear(h, weight, bias))
        if not is_resident:
            update = column_update(weight, delta, indices, scaling, y.dtype)
            add_columns_(y, select(h, indices), update, indices)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A lean MLP has no second derivative; call `pacatune.lean.disable(model)` before "
                "`create_graph=True`."
            )
        needs_gate, needs_up, _, needs_delta, _, _, needs_bias, *_ = ctx.needs_input_grad
        gate, up, weight_OI, delta_OR, indices_R = ctx.saved_tensors
        indices_R = held_indices(ctx, indices_R)
        scaling, is_resident, source, activation = ctx.call
        gy_NO = gy.reshape(-1, gy.shape[-1])
        ggate = gup = gdelta = None
        if needs_delta:
            columns = distinct_columns(indices_R)
            h_NR = activation.product_columns(gate, up, columns).view(-1, len(columns))
            gdelta = grad_delta(gy_NO, h_NR, scaling, delta_OR.dtype, indices_R)
        if needs_gate or needs_up:
            if source is None:
                gh_NI = grad_x(gy_NO, delta_OR, indices_R, scaling, weight_OI, is_resident)
            else:
                gh_NI = source.backward(partial(grad_x, gy_NO, delta_OR, indices_R, scaling))
            gh = gh_NI.view(gate.shape)
            ggate, gup = activation.owned_product_gradients(gh, gate, up)
        gbias = gy_NO.sum(0) if needs_bias else None
        return ggate, gup, None, gdelta, None, None, gbias, None, None, None


def apply_paca_gated(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    delta: Tensor,
    indices: Tensor,
    scaling: float,
    bias: Tensor | None,
    is_resident: bool,
    source: Source | None,
    activation: Elementwise,
) -> Tensor:
    """Apply a PaCA layer to act(gate) * up.

    Saves gate, up, and references to delta and indices, without `source` to the weight too. By
    comparison with the layer and the product apart, backward costs act on R columns once more.

    Args:
        gate: (..., I) in the dtype that the layer computes in.
        up: (..., I) in the same dtype.
        weight: (O, I) frozen; holds the adapted columns where `is_resident`.
        delta: (O, R) trained.
        indices: (R,) int64, or (G, R) of row groups.
        scaling: alpha / R.
        bias: (O,) or None.
        is_resident: Whether `weight` holds the adapted columns now.
        source: Where the backward pass finds the weight again; None: it is saved.
        activation: act.

    Returns:
        (..., O).
    """
    return _PacaGated.apply(
        gate, up, weight, delta, indices, scaling, bias, is_resident, source, activation
    )
