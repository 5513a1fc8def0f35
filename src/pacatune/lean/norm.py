"""Normalisation that keeps its input as it came, and one or two numbers per row.

In 16 bits, the norms of transformers compute in float32, and plain autograd then keeps the float32
copy of the input: four bytes per element where the input has two. Here the input is kept in its
own dtype (often something else keeps the same tensor, and it is kept once) and the copy is made
again. The forward pass does the same operations in the same order as the modules do.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from pacatune.lean.fused import fused
from pacatune.ops.columns import widened
from pacatune.ops.tracing import NOT_LEAN, refuse_second_derivative


@dataclass(frozen=True)
class Norm:
    """How a module normalises: what families differ in.

    Attributes:
        eps: Added to the variance.
        centred: Whether the mean is subtracted (LayerNorm).
        plus_one: Whether the factor is 1 + weight, in float32 (Gemma).
        rounds_first: Whether rows are rounded to the dtype of the input before they are multiplied
            with the weight (Llama) or after (Gemma, OLMo 2).
        mixes: Whether this holds, too, where input and weight differ in dtype.
    """

    eps: float
    centred: bool = False
    plus_one: bool = False
    rounds_first: bool = True
    mixes: bool = True


def plain_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm) -> Tensor:
    """Compute the same in plain autograd."""
    return _forward(x, weight, bias, norm)[0]


@fused
def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return output, means (None where they are not subtracted) and rstd, both (..., 1)."""
    wide = widened(x)
    if norm.centred:
        w, b = (None if p is None else widened(p) for p in (weight, bias))
        y, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], w, b, norm.eps)
        return y.to(x.dtype), mean, rstd
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    n = wide * rstd
    if norm.rounds_first:
        n = n.to(x.dtype)
        return (n if weight is None else weight * n), None, rstd
    if weight is not None:
        n = n * _factor(weight, norm)
    return n.to(x.dtype), None, rstd


def _factor(weight: Tensor, norm: Norm) -> Tensor:
    return 1.0 + widened(weight) if norm.plus_one else weight


class _Norm(torch.autograd.Function):
    """Normalise rows (..., I), computed in float32 (float64 stays).

    Forward   n = x rstd     rstd = (mean(x^2) + eps)^(-1/2)     y = n * weight
    Backward  dn = dy * weight    dx = rstd (dn - n mean(dn * n))    d(weight) = sum(dy * n)
    Saves x in its own dtype and rstd, one float32 number per row; computes n twice. LayerNorm
    saves the mean, too, and makes the float32 copy twice.

    Source: B. Zhang, R. Sennrich, Root Mean Square Layer Normalization, 2019.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm
    ) -> Tensor:
        y, mean, rstd = _forward(x, weight, bias, norm)
        ctx.norm, ctx.bias_dtype = norm, None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("A lean norm", NOT_LEAN)
        x, weight, mean, rstd = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if not ctx.norm.centred:
            gradients = _gradients(x, gy, weight, rstd, ctx.norm, needs_x, needs_weight)
            return *gradients, None, None
        wide = None if weight is None else widened(weight)
        wanted = [needs_x, needs_weight, False]
        gx, gweight, _ = torch.ops.aten.native_layer_norm_backward(
            widened(gy), widened(x), x.shape[-1:], mean, rstd, wide, None, wanted
        )
        return (
            gx.to(x.dtype) if needs_x else None,
            gweight.to(weight.dtype) if needs_weight else None,
            _sum_rows(widened(gy)).to(ctx.bias_dtype) if needs_bias else None,
            None,
        )


@fused
def _gradients(
    x: Tensor,
    gy: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    norm: Norm,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    gx = gweight = None
    n = widened(x) * rstd
    if needs_weight and weight is not None:
        products = gy * n.to(x.dtype) if norm.rounds_first else widened(gy) * n
        gweight = _sum_rows(products).to(weight.dtype)
    if needs_x:
        if norm.rounds_first:
            gn = widened((gy if weight is None else gy * weight).to(x.dtype))
        else:
            gn = widened(gy) if weight is None else widened(gy) * _factor(weight, norm)
        mean = (gn * n).mean(-1, keepdim=True)
        gx = n.mul_(mean).sub_(gn).mul_(-rstd).to(x.dtype)
    return gx, gweight


def _sum_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).sum(0)


def source_of(y: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Norm] | None:
    """Return x, weight, bias and norm that gave `y`, if it is a lean norm's output as it came."""
    # An attribute of `y`: the norm's saved tensors would not do, since checkpointing gives each of
    # them once, and to patch blocks would need the code of each model.
    version, source = getattr(y, "lean_source", (None, None))
    return source if version == y._version else None


def apply_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm) -> Tensor:
    """Normalise (..., I) by weight and bias, (I,) or None; the output knows its source."""
    y: Tensor = _Norm.apply(x, weight, bias, norm)
    if y.requires_grad:  # all that it names is kept for the norm's own gradient anyway
        cast(Any, y).lean_source = y._version, (x.detach(), weight, bias, norm)
    return y
