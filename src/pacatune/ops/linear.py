"""The hand-written gradients of PaCA: one linear map of which R input columns are trained.

Per layer, with N tokens, I input and O output features, plain autograd and PaCA differ only in what
they keep:

    nn.Linear, all columns trained    keeps x              N * I elements
    LoRA of rank R                    keeps x and x A^T    N * (I + R) elements
    PaCA, R columns trained           keeps x[:, indices]  N * R elements

and all three run the same two large GEMMs (y = x W^T, dx = dy W). PaCA adds one gather in the
forward pass and one thin GEMM in the backward pass; nothing runs in sequence with the large GEMMs.
The tests hold them to the same equations in plain autograd (tests/ops/reference.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pacatune.ops.columns import Update, check_form, read_columns
from pacatune.ops.products import autocast, cast, grad_delta, owned, thin_product
from pacatune.ops.tracing import refuse_second_derivative

Result = TypeVar("Result")


class Elementwise(Protocol):
    """The activation of a gated product: `pacatune.lean.gated.Activation` is one."""

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return act(gate) * up, a tensor of its own."""

    def product_columns(self, gate: Tensor, up: Tensor, indices: Tensor) -> Tensor:
        """Return the (..., R) columns of act(gate) * up."""

    def owned_product_gradients(
        self, gh: Tensor, gate: Tensor, up: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of gate and up; may overwrite `gh`, and what can be made anew."""


def paca_linear(x: Tensor, weight: Tensor, update: Update, bias: Tensor | None = None) -> Tensor:
    """Apply a linear map that trains only the input columns `indices` (Eqs. 7-9).

    Forward   y = x W'^T + b            W' already holds the adapted columns
    Backward  dx = dy W'                d(delta) = scaling * dy^T x[..., indices]
    Saves x[..., indices]: R/I of what nn.Linear keeps, and references to W', delta and indices.

    The columns of `weight` must be W[:, indices] + scaling * delta when this is called and when the
    backward pass runs; both read them there.

    Args:
        x: (..., I) activations, any number of leading dimensions, zero tokens included.
        weight: (O, I) frozen weight with the adapted columns written in.
        update: Of R columns; its (O, R) delta receives the gradient.
        bias: (O,) bias, frozen or trained.

    Returns:
        (..., O) activations in the dtype of `x`, or of autocast where that is on.

    Raises:
        ValueError: If the shapes of `x`, `weight`, `update` and `bias` do not fit.

    Source: PaCA, Eqs. 7-9, with the columns written as W + scaling * delta.
    """
    _check_shapes(x, weight, update, bias)
    delta, indices, scaling = update
    call = Call(scaling)
    return _PacaLinear.apply(autocast(x), delta, indices, bias, None, call, weight, True)


def paca_linear_additive(
    x: Tensor, weight: Tensor, update: Update, bias: Tensor | None = None
) -> Tensor:
    """Apply the same map as `paca_linear`, from the *pretrained* weight, which is not written.

    Forward   y = x W^T + b + x[..., indices] (scaling * delta)^T
    Backward  dx = dy W + (dy scaling * delta in the columns)    d(delta) as in `paca_linear`
    Saves the same. Costs one thin GEMM more in each direction and saves writing the columns, which
    takes longer when there are few tokens.

    Args:
        x: (..., I) activations.
        weight: (O, I) frozen pretrained weight.
        update: Of R columns; its (O, R) delta receives the gradient.
        bias: (O,) bias, frozen or trained.

    Returns:
        (..., O) activations in the dtype of `x`, or of autocast where that is on.

    Raises:
        ValueError: If the shapes of `x`, `weight`, `update` and `bias` do not fit.

    Source: PaCA, Eqs. 7-9, distributed over the sum W + scaling * delta.
    """
    _check_shapes(x, weight, update, bias)
    delta, indices, scaling = update
    call = Call(scaling)
    return _PacaLinear.apply(autocast(x), delta, indices, bias, None, call, weight, False)


def _check_shapes(x: Tensor, weight: Tensor, update: Update, bias: Tensor | None) -> None:
    delta, indices, _ = update
    if weight.dim() != 2:
        raise ValueError(f"`weight` must be (O, I), got shape {tuple(weight.shape)}.")
    out_features, in_features = weight.shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"`x` must be (..., I={in_features}) to fit `weight` {tuple(weight.shape)}, "
            f"got shape {tuple(x.shape)}."
        )
    check_form(indices)
    if delta.shape != (out_features, len(indices)):
        raise ValueError(
            f"`delta` must be (O={out_features}, R={len(indices)}) to fit `weight` and `indices`, "
            f"got shape {tuple(delta.shape)}."
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"`bias` must be (O={out_features},), got shape {tuple(bias.shape)}.")


def column_update(weight: Tensor, update: Update, dtype: torch.dtype) -> Tensor:
    """Return what the columns of W' multiply x with beyond those of W, for `add_columns_`.

    In 16 bits W' is rounded, and updates of less than half a unit in its last place are lost. Their
    difference may have more than 16 bits, so both are returned, the new columns and minus the old
    ones: a model is one function, whether its columns are in the weight, beside it or merged.

    Args:
        weight: (O, I) pretrained weight.
        update: Of R columns.
        dtype: What the product is computed in.

    Returns:
        In 16 bits (O, 2R), otherwise (O, R) scaling * delta; in `dtype`.
    """
    if dtype.itemsize > 2:
        wide = cast(update.delta, dtype)
        return wide if update.scaling == 1.0 else wide * update.scaling
    columns = read_columns(weight, update.indices)
    return torch.cat((cast(update.adapted(columns), dtype), cast(columns, dtype).neg()), 1)


class Call:
    """What a pass is told beside its tensors; the weight of this one is saved and must stay.

    Args:
        scaling: alpha / R.
        activation: The layer is applied to act(gate) * x. Of that nothing is kept: gate and x are
            kept by their product anyway, 2 I elements per token, and two columns of them give one
            of it again.
    """

    __slots__ = ("activation", "scaling")
    saves_weight = True

    def __init__(self, scaling: float, activation: Elementwise | None = None) -> None:
        self.scaling, self.activation = scaling, activation

    def backward(self, compute: Callable[[Tensor, bool], Result]) -> Result:
        """Return compute(weight, is_resident) on the weight of the forward pass, if not saved.

        Args:
            compute: Takes the (O, I) weight, and whether the adapted columns are in it now.
        """
        raise NotImplementedError


class _PacaLinear(torch.autograd.Function):
    """Eqs. 7-9 in both forms."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor,
        indices: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        call: Call,
        weight: Tensor,
        is_resident: bool,
    ) -> Tensor:
        needs_x, needs_delta, _, _, needs_gate, *_ = ctx.needs_input_grad
        ctx.call = x.shape, call, is_resident
        activation = call.activation
        kept = x_R = None
        if activation is not None and gate is not None:
            kept, x = x, activation.product(gate, x)
        if (needs_delta and kept is None) or not is_resident:
            x_R = x.index_select(-1, indices)
        # `delta` is saved even where only its version is read: an in-place change between forward
        # and backward then raises torch's own error instead of giving a mixed gradient.
        ctx.save_for_backward(
            x_R if kept is None and needs_delta else kept,
            weight if (needs_x or needs_gate) and call.saves_weight else None,
            delta,
            indices,
            gate,
        )
        y = owned(F.linear(x, weight, bias))
        if x_R is not None and not is_resident:
            update = Update(delta, indices, call.scaling)
            add_columns_(y, x_R, column_update(weight, update, y.dtype))
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # asked here: every layer's pass does
            refuse_second_derivative("paca_linear")
        needs_x, needs_delta, _, needs_bias, needs_gate, *_ = ctx.needs_input_grad
        kept, weight_OI, delta_OR, indices_R, gate = ctx.saved_tensors
        x_shape, call, is_resident = ctx.call
        scaling, activation = call.scaling, call.activation
        gy_NO = gy if gy.dim() == 2 else gy.reshape(-1, gy.shape[-1])
        gx = gdelta = gbias = ggate = None
        if needs_delta:
            x_NR = kept
            if activation is not None:
                x_NR = activation.product_columns(gate, kept, indices_R)
            if len(x_shape) != 2:
                x_NR = x_NR.flatten(0, len(x_shape) - 2) if len(x_shape) > 2 else x_NR.unsqueeze(0)
            gdelta = grad_delta(gy_NO, x_NR, scaling, delta_OR.dtype)
        if needs_x or needs_gate:
            update = delta_OR, indices_R, scaling
            if call.saves_weight:
                gx_NI = grad_x(gy_NO, update, weight_OI, is_resident)
            else:
                gx_NI = call.backward(partial(grad_x, gy_NO, update))
            gx = gx_NI.view(x_shape)
            if activation is not None:
                ggate, gx = activation.owned_product_gradients(gx, gate, kept)
        if needs_bias:
            gbias = gy_NO.sum(0)
        return gx, gdelta, None, gbias, ggate, None, None, None


def add_columns_(y: Tensor, x_R: Tensor, update: Tensor) -> Tensor:
    """Add to the (..., O) product of the pretrained weight, in place, what `column_update` says.

    `x_R` is x[..., indices].
    """
    y_NO = y.view(-1, y.shape[-1])
    y_NO.addmm_(_inputs(x_R, update, y_NO), update.t())
    return y


def add_columns(y: Tensor, x_R: Tensor, update: Tensor) -> Tensor:
    """Return what `add_columns_` makes of (..., O), by operations that autograd knows."""
    y_NO = y.reshape(-1, y.shape[-1])
    return torch.addmm(y_NO, _inputs(x_R, update, y_NO), update.t()).view(y.shape)


def _inputs(x_R: Tensor, update: Tensor, y_NO: Tensor) -> Tensor:
    """Return (N, R) in the dtype of y, twice where an update has new columns and old ones."""
    x_NR = cast(x_R, y_NO.dtype).reshape(y_NO.shape[0], x_R.shape[-1])
    return torch.cat((x_NR, x_NR), 1) if update.shape[1] > x_NR.shape[1] else x_NR


def grad_x(
    gy_NO: Tensor, update: tuple[Tensor, Tensor, float], weight_OI: Tensor, is_resident: bool
) -> Tensor:
    """Return dy W' as (N, I), from a weight that holds the columns of an update or not (Eq. 8)."""
    is_cast = weight_OI.dtype != gy_NO.dtype  # under autocast
    gx_NI = gy_NO.mm(weight_OI.to(gy_NO.dtype) if is_cast else weight_OI)
    if not is_resident:
        columns_OR, indices_R = column_update(weight_OI, Update(*update), gy_NO.dtype), update[1]
        rank = indices_R.shape[0]
        if columns_OR.shape[1] == rank:
            gx_NI.index_add_(1, indices_R, thin_product(gy_NO, columns_OR))
        else:  # those of W' as they are
            gx_NI.index_copy_(1, indices_R, thin_product(gy_NO, columns_OR[:, :rank]))
    return gx_NI


# The unchecked form of both functions, for hot paths: Function.apply without its first half, which
# takes as long as the second and refuses torch.func's transforms. The caller sees to both.
apply_paca_linear: Callable[..., Tensor] = super(torch.autograd.Function, _PacaLinear).apply
