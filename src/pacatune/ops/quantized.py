"""QPaCA: a frozen weight of few bits, of which R columns are trained in full precision.

The weight is never written. Each pass dequantises it into a temporary, puts the adapted columns
there, multiplies once and lets go of it:

    forward    W = dequantize()   W[:, indices] += scaling * delta   y  = x W^T + b
    backward   the same W again                                      dx = dy W
                                        d(delta) = scaling * dy^T x[..., indices]; mix: `ops.linear`

Kept for backward are x[..., indices] and references; the peak is one dequantised weight.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pacatune.ops.columns import Update, put_columns_, read_columns
from pacatune.ops.products import autocast, cast, grad_delta, grad_factors, owned
from pacatune.ops.tracing import refuse_second_derivative


def paca_quantized_linear(
    x: Tensor,
    update: Update,
    dequantize: Callable[[torch.dtype], Tensor],
    bias: Tensor | None = None,
    multiply: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Apply a quantised linear map of which the input columns `indices` are trained.

    Args:
        x: (..., I) activations, in the dtype to compute in where autocast is off.
        update: Of C columns; its delta and mix receive the gradients.
        dequantize: Returns the frozen (O, I) weight in a dtype, as a tensor that is ours to change.
            Called once in the forward and once in the backward pass.
        bias: (O,) bias, frozen or trained.
        multiply: Computes x W^T + b by a kernel of its own for the quantised weight, such as one
            that quantises x as well. The columns are then added to its result; the backward pass
            dequantises.

    Returns:
        (..., O) activations in the dtype of `x`, of autocast where that is on, or of `multiply`.

    Source: PaCA, Sec. 4.3 and Eqs. 7-9, with the columns written as W + scaling * delta.
    """
    delta, indices, scaling, mix = update
    how = scaling, dequantize, multiply
    y: Tensor = _PacaQuantizedLinear.apply(autocast(x), delta, mix, indices, bias, how)
    return y


_How = tuple[float, Callable[[torch.dtype], Tensor], Callable[[Tensor], Tensor] | None]
"""Scaling, `dequantize` and `multiply`."""


class _PacaQuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor,
        mix: Tensor | None,
        indices: Tensor,
        bias: Tensor | None,
        how: _How,
    ) -> Tensor:
        _, needs_delta, needs_mix, *_ = ctx.needs_input_grad
        scaling, dequantize, multiply = how
        needs_update = needs_delta or needs_mix
        x_C = x.index_select(-1, indices) if needs_update or multiply is not None else None
        ctx.save_for_backward(x_C if needs_update else None, delta, mix, indices)
        ctx.call = x.shape, scaling, dequantize
        if multiply is None:
            weight = _adapted(dequantize(x.dtype), Update(delta, indices, scaling, mix))
            weight = cast(weight, x.dtype)
            return owned(F.linear(x, weight, bias))
        assert x_C is not None
        y = owned(multiply(x))
        x_R = cast(x_C, y.dtype)
        x_R = x_R if mix is None else F.linear(x_R, mix.to(y.dtype))
        return y.add_(F.linear(x_R, delta.to(y.dtype)), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("paca_quantized_linear")
        needs_x, needs_delta, needs_mix, _, needs_bias, _ = ctx.needs_input_grad
        x_C, delta, mix, indices = ctx.saved_tensors
        x_shape, scaling, dequantize = ctx.call
        gy_NO = gy if gy.dim() == 2 else gy.reshape(-1, gy.shape[-1])
        gx = gdelta = gmix = gbias = None
        if needs_delta or needs_mix:
            x_NC = x_C.reshape(-1, x_C.shape[-1]).to(gy.dtype)  # `multiply` may return another
            if mix is None:
                gdelta = grad_delta(gy_NO, x_NC, scaling, delta.dtype)
            else:
                gdelta, gmix = grad_factors(gy_NO, x_NC, delta, mix, scaling)
        if needs_x:
            weight = _adapted(dequantize(gy.dtype), Update(delta, indices, scaling, mix))
            gx = gy_NO.mm(cast(weight, gy.dtype)).view(x_shape)
        if needs_bias:
            gbias = gy_NO.sum(0)
        return gx, gdelta, gmix, None, gbias, None


def _adapted(weight: Tensor, update: Update) -> Tensor:
    """Put the adapted columns into a dequantised weight, in place, rounding once."""
    put_columns_(weight, update.indices, update.adapted(read_columns(weight, update.indices)))
    return weight


def decoded_linear(x: Tensor, decode: Callable[[], Tensor], bias: Tensor | None = None) -> Tensor:
    """Apply a frozen linear map whose weight is decoded in each pass; saves nothing.

    Args:
        x: (..., I).
        decode: Returns the (O, I) weight as a new tensor.
        bias: (O,), frozen or trained.

    Returns:
        (..., O) in the dtype of `x`, or of autocast where that is on.
    """
    y: Tensor = _DecodedLinear.apply(autocast(x), bias, decode)
    return y


class _DecodedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, decode: Callable[[], Tensor]) -> Tensor:
        ctx.call = x.shape, decode
        bias = None if bias is None else cast(bias, x.dtype)
        return owned(F.linear(x, cast(decode(), x.dtype), bias))

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("decoded_linear")
        needs_x, needs_bias, _ = ctx.needs_input_grad
        shape, decode = ctx.call
        gy_NO = gy.reshape(-1, gy.shape[-1])
        gx = gy_NO.mm(cast(decode(), gy.dtype)).view(shape) if needs_x else None
        return gx, gy_NO.sum(0) if needs_bias else None, None
