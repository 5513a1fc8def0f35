"""The hand-written gradients of PaCA: one linear map of which R input columns are trained.

Per layer, with N tokens, I input and O output features, plain autograd and PaCA differ only in what they keep:

    nn.Linear, all columns trained    keeps x              N * I elements
    LoRA of rank R                    keeps x and x A^T    N * (I + R) elements
    PaCA, R columns trained           keeps x[:, indices]  N * R elements

and all three run the same two large GEMMs (y = x W^T, dx = dy W). PaCA adds one gather in the forward pass and one thin
GEMM in the backward pass; nothing runs in sequence with the large GEMMs. `reference.py` states the same equations in
plain autograd; the tests hold the two together.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["paca_linear"]


def paca_linear(
    x: Tensor,
    weight: Tensor,
    delta: Tensor,
    indices: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    is_resident: Callable[[], bool] | None = None,
) -> Tensor:
    """Apply a linear map that trains only the input columns `indices` (Eqs. 7-9).

    Forward   y = x W'^T + b            W' already holds the adapted columns
    Backward  dx = dy W'                d(delta) = scaling * dy^T x[..., indices]
    Saves x[..., indices]: R/I of what nn.Linear keeps, and references to W', delta and indices.

    The columns of `weight` must be W[:, indices] + scaling * delta when this is called: the forward
    pass reads them there and nowhere else. They are read again in the backward pass.

    Args:
        x: (..., I) activations, any number of leading dimensions, zero tokens included.
        weight: (O, I) frozen weight with the adapted columns written in.
        delta: (O, R) trained update of the columns, any floating dtype; receives the gradient.
        indices: (R,) int64, the trained columns.
        scaling: alpha / R, the factor between `delta` and the columns.
        bias: (O,) bias, frozen or trained.
        is_resident: Called in the backward pass before `weight` is read. Returns True once `weight`
            holds the adapted columns again, False if it holds the pretrained ones and must stay
            so; the columns' part of dx is then added from `delta`. None: `weight` is as it was.

    Returns:
        (..., O) activations in the dtype of `x`, or of autocast where that is on.

    Raises:
        ValueError: If the shapes of `x`, `weight`, `delta`, `indices` and `bias` do not fit.

    Source: PaCA, Eqs. 7-9, with the columns written as W + scaling * delta.
    """
    _check_shapes(x, weight, delta, indices, bias)
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.itemsize < 8:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return apply_paca_linear(x, weight, delta, indices, scaling, bias, is_resident)


def _check_shapes(
    x: Tensor, weight: Tensor, delta: Tensor, indices: Tensor, bias: Tensor | None
) -> None:
    if weight.dim() != 2:
        raise ValueError(f"`weight` must be (O, I), got shape {tuple(weight.shape)}.")
    out_features, in_features = weight.shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"`x` must be (..., I={in_features}) to fit `weight` {tuple(weight.shape)}, "
            f"got shape {tuple(x.shape)}."
        )
    if indices.dim() != 1 or indices.dtype != torch.int64:
        raise ValueError(
            f"`indices` must be (R,) int64, got shape {tuple(indices.shape)} of {indices.dtype}."
        )
    if delta.shape != (out_features, indices.shape[0]):
        raise ValueError(
            f"`delta` must be (O={out_features}, R={indices.shape[0]}) to fit `weight` and "
            f"`indices`, got shape {tuple(delta.shape)}."
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"`bias` must be (O={out_features},), got shape {tuple(bias.shape)}.")


class _PacaLinear(torch.autograd.Function):
    """Eqs. 7-9; arguments as in `paca_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        delta: Tensor,
        indices: Tensor,
        scaling: float,
        bias: Tensor | None,
        is_resident: Callable[[], bool] | None,
    ) -> Tensor:
        needs_x, _, needs_delta, *_ = ctx.needs_input_grad
        ctx.scaling, ctx.is_resident, ctx.x_shape = scaling, is_resident, x.shape
        # `delta` and `weight` are saved even where only their version is read: an in-place change between
        # forward and backward then raises torch's own error instead of giving a mixed gradient.
        ctx.save_for_backward(
            x.index_select(-1, indices) if needs_delta else None,
            weight if needs_x else None,
            delta,
            indices,
        )
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, _, needs_delta, _, _, needs_bias, _ = ctx.needs_input_grad
        x_NR, weight_OI, delta_OR, indices_R = ctx.saved_tensors
        gy_NO = gy.reshape(-1, gy.shape[-1])
        gx = gdelta = gbias = None
        if needs_delta:
            gdelta = _grad_delta(gy_NO, x_NR.reshape(-1, x_NR.shape[-1]), ctx.scaling, delta_OR)
        if needs_x:
            resident = ctx.is_resident is None or ctx.is_resident()
            gx_NI = gy_NO.mm(weight_OI.to(gy.dtype))
            if not resident:
                columns_NR = gy_NO.mm(delta_OR.to(gy.dtype)).mul_(ctx.scaling)
                gx_NI.index_add_(1, indices_R, columns_NR)
            gx = gx_NI.view(ctx.x_shape)
        if needs_bias:
            gbias = gy_NO.sum(0)
        return gx, None, gdelta, None, None, gbias, None


def _grad_delta(gy_NO: Tensor, x_NR: Tensor, scaling: float, delta: Tensor) -> Tensor:
    """Return scaling * dy^T x as (O, R) in the dtype of `delta` (Eq. 9).

    Computed as (x^T dy)^T: with R much smaller than O this order is 2 to 3 times faster on CPUs.
    """
    g_RO = x_NR.t().mm(gy_NO)
    gdelta = torch.empty_like(delta, memory_format=torch.contiguous_format).copy_(g_RO.t())
    return gdelta if scaling == 1.0 else gdelta.mul_(scaling)


apply_paca_linear = _PacaLinear.apply
