"""The hand-written gradients of PaCA: one linear map of which R input columns are trained.

Per layer, with N tokens, I input and O output features, plain autograd and PaCA differ only in what
they keep:

    nn.Linear, all columns trained    keeps x              N * I elements
    LoRA of rank R                    keeps x and x A^T    N * (I + R) elements
    PaCA, C columns trained           keeps x[:, indices]  N * C elements

and all three run the same two large GEMMs (y = x W^T, dx = dy W). PaCA adds one gather in the
forward pass and one thin GEMM in the backward pass, four where the columns' update is of low rank;
nothing runs in sequence with the large GEMMs.
The tests hold them to the same equations in plain autograd (tests/ops/reference.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pacatune.ops.columns import Update, check_form, read_columns, with_columns
from pacatune.ops.products import autocast, cast, grad_delta, grad_factors, owned, thin_product
from pacatune.ops.tracing import refuse_second_derivative


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
    with mix                            d(delta) = scaling * dy^T (x[..., indices] mix^T)
                                        d(mix) = scaling * (dy delta)^T x[..., indices]
    Saves x[..., indices]: C/I of what nn.Linear keeps, and references to W' and the update.

    The columns of `weight` must be those of W' when this is called and when the backward pass runs;
    both read them there.

    Args:
        x: (..., I) activations, any number of leading dimensions, zero tokens included.
        weight: (O, I) frozen weight with the adapted columns written in.
        update: Of C columns; its delta and mix receive the gradients.
        bias: (O,) bias, frozen or trained.

    Returns:
        (..., O) activations in the dtype of `x`, or of autocast where that is on.

    Raises:
        ValueError: If the shapes of `x`, `weight`, `update` and `bias` do not fit.

    Source: PaCA, Eqs. 7-9, with the columns written as W + scaling * delta.
    """
    _check_shapes(x, weight, update, bias)
    delta, indices, scaling, mix = update
    call = Call(scaling)
    return _PacaLinear.apply(autocast(x), delta, mix, indices, bias, None, call, weight, True)


def paca_linear_additive(
    x: Tensor, weight: Tensor, update: Update, bias: Tensor | None = None
) -> Tensor:
    """Apply the same map as `paca_linear`, from the *pretrained* weight, which is not written.

    Forward   y = x W^T + b + x[..., indices] (scaling * delta)^T; in 16 bits of a temporary W'
    Backward  dx = dy W + (dy scaling * delta in the columns)    the update's as in `paca_linear`
    Saves the same. Costs one thin GEMM more in each direction, two with mix, or the temporary, and
    saves writing the columns, which takes longer when there are few tokens.

    Args:
        x: (..., I) activations.
        weight: (O, I) frozen pretrained weight.
        update: Of C columns; its delta and mix receive the gradients.
        bias: (O,) bias, frozen or trained.

    Returns:
        (..., O) activations in the dtype of `x`, or of autocast where that is on.

    Raises:
        ValueError: If the shapes of `x`, `weight`, `update` and `bias` do not fit.

    Source: PaCA, Eqs. 7-9, distributed over the sum W + scaling * delta.
    """
    _check_shapes(x, weight, update, bias)
    delta, indices, scaling, mix = update
    call = Call(scaling)
    return _PacaLinear.apply(autocast(x), delta, mix, indices, bias, None, call, weight, False)


def _check_shapes(x: Tensor, weight: Tensor, update: Update, bias: Tensor | None) -> None:
    delta, indices, _, mix = update
    if weight.dim() != 2:
        raise ValueError(f"`weight` must be (O, I), got shape {tuple(weight.shape)}.")
    out_features, in_features = weight.shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"`x` must be (..., I={in_features}) to fit `weight` {tuple(weight.shape)}, "
            f"got shape {tuple(x.shape)}."
        )
    check_form(indices)
    num_columns = len(indices)
    rank = num_columns if mix is None else len(mix)
    if delta.shape != (out_features, rank):
        raise ValueError(
            f"`delta` must be (O={out_features}, R={rank}) to fit `weight` and "
            f"`{'indices' if mix is None else 'mix'}`, got shape {tuple(delta.shape)}."
        )
    if mix is not None and mix.shape != (rank, num_columns):
        raise ValueError(
            f"`mix` must be (R, C={num_columns}) to fit `indices`, got shape {tuple(mix.shape)}."
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"`bias` must be (O={out_features},), got shape {tuple(bias.shape)}.")


def linear_beside(x: Tensor, weight: Tensor, update: Update, bias: Tensor | None) -> Tensor:
    """Return x W'^T + b, (..., O), from the pretrained (O, I) weight, which is not written.

    In 16 bits W' is a temporary copy. An update that is added to the product of W is lost where it
    is less than half a unit of y, which is many units of W': the model would seem to have learned
    less. So it has the bits of a merged one, and an untrained adapter those of the base.
    """
    if x.itemsize <= 2:
        columns, _ = _both_columns(weight, update, x.dtype)
        adapted = with_columns(cast(weight, x.dtype), update.indices, columns)
        return owned(F.linear(x, adapted, bias))
    y = owned(F.linear(x, weight, bias))
    x_NR = x.index_select(-1, update.indices).reshape(-1, len(update.indices))
    if update.mix is not None:
        x_NR = x_NR.mm(cast(update.mix, x.dtype).t())
    y.view(-1, y.shape[-1]).addmm_(x_NR, _scaled(update.delta, update.scaling, x.dtype).t())
    return y


def add_columns(y: Tensor, x_C: Tensor, weight: Tensor, update: Update) -> Tensor:
    """Return (..., O) in 16 bits with what columns of W' add to the product of W; for autograd.

    W' is rounded, and its difference from W may have more than 16 bits, so both are multiplied. For
    whoever has nothing but the product of W: y has been rounded before, see `linear_beside`.
    """
    y_NO = y.reshape(-1, y.shape[-1])
    x_NC = cast(x_C, y.dtype).reshape(y_NO.shape[0], x_C.shape[-1])
    new, old = _both_columns(weight, update, y.dtype)
    columns = torch.cat((new, old.neg()), 1)
    return torch.addmm(y_NO, torch.cat((x_NC, x_NC), 1), columns.t()).view(y.shape)


def _both_columns(weight: Tensor, update: Update, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    columns = read_columns(weight, update.indices)
    return cast(update.adapted(columns), dtype), cast(columns, dtype)


def _scaled(delta: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    wide = cast(delta, dtype)
    return wide if scaling == 1.0 else wide * scaling


class Call:
    """What a pass is told beside its tensors; the weight of this one is saved and must stay.

    One that does not save the weight, such as `pacatune.residency.Pass`, has a method `backward`:
    it returns compute(weight, is_resident) on the weight that the forward pass saw.

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


class _PacaLinear(torch.autograd.Function):
    """Eqs. 7-9 in both forms."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor,
        mix: Tensor | None,
        indices: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        call: Call,
        weight: Tensor,
        is_resident: bool,
    ) -> Tensor:
        needs_x, needs_delta, needs_mix, _, _, needs_gate, *_ = ctx.needs_input_grad
        needs_update = needs_delta or needs_mix
        ctx.call = x.shape, call, is_resident
        activation = call.activation
        kept = x_C = None
        if activation is not None and gate is not None:
            kept, x = x, activation.product(gate, x)
        if needs_update and kept is None:
            x_C = x.index_select(-1, indices)
        # `delta` is saved even where only its version is read: an in-place change between forward
        # and backward then raises torch's own error instead of giving a mixed gradient.
        ctx.save_for_backward(
            x_C if kept is None else kept,
            weight if (needs_x or needs_gate) and call.saves_weight else None,
            delta,
            mix,
            indices,
            gate,
        )
        if is_resident:
            return owned(F.linear(x, weight, bias))
        return linear_beside(x, weight, Update(delta, indices, call.scaling, mix), bias)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # asked here: every layer's pass does
            refuse_second_derivative("paca_linear")
        needs_x, needs_delta, needs_mix, _, needs_bias, needs_gate, *_ = ctx.needs_input_grad
        kept, weight_OI, delta_OR, mix_RC, indices_C, gate = ctx.saved_tensors
        x_shape, call, is_resident = ctx.call
        scaling, activation = call.scaling, call.activation
        gy_NO = gy if gy.dim() == 2 else gy.reshape(-1, gy.shape[-1])
        gx = gdelta = gmix = gbias = ggate = None
        if needs_delta or needs_mix:
            x_NC = kept
            if activation is not None:
                x_NC = activation.product_columns(gate, kept, indices_C)
            if len(x_shape) != 2:
                x_NC = x_NC.flatten(0, len(x_shape) - 2) if len(x_shape) > 2 else x_NC.unsqueeze(0)
            if mix_RC is None:
                gdelta = grad_delta(gy_NO, x_NC, scaling, delta_OR.dtype)
            else:
                gdelta, gmix = grad_factors(gy_NO, x_NC, delta_OR, mix_RC, scaling)
        if needs_x or needs_gate:
            update = delta_OR, indices_C, scaling, mix_RC
            if call.saves_weight:
                gx_NI = grad_x(gy_NO, update, weight_OI, is_resident)
            else:
                gx_NI = call.backward(partial(grad_x, gy_NO, update))
            gx = gx_NI.view(x_shape)
            if activation is not None:
                ggate, gx = activation.owned_product_gradients(gx, gate, kept)
        if needs_bias:
            gbias = gy_NO.sum(0)
        return gx, gdelta, gmix, None, gbias, ggate, None, None, None


def grad_x(
    gy_NO: Tensor, update: tuple[Any, Tensor, float, Any], weight_OI: Tensor, is_resident: bool
) -> Tensor:
    """Return dy W' as (N, I), from a weight that holds the columns of an update or not (Eq. 8)."""
    is_cast = weight_OI.dtype != gy_NO.dtype  # under autocast
    gx_NI = gy_NO.mm(weight_OI.to(gy_NO.dtype) if is_cast else weight_OI)
    if not is_resident:
        delta, indices, scaling, mix = update
        if gy_NO.itemsize > 2:
            gx_NR = thin_product(gy_NO, _scaled(delta, scaling, gy_NO.dtype))
            gx_NC = gx_NR if mix is None else gx_NR.mm(cast(mix, gy_NO.dtype))
            gx_NI.index_add_(1, indices, gx_NC)
        else:  # those of W' as they are
            new, _ = _both_columns(weight_OI, Update(*update), gy_NO.dtype)
            gx_NI.index_copy_(1, indices, thin_product(gy_NO, new))
    return gx_NI


# The unchecked form of both functions, for hot paths: Function.apply without its first half, which
# takes as long as the second and refuses torch.func's transforms. The caller sees to both.
apply_paca_linear: Callable[..., Tensor] = super(torch.autograd.Function, _PacaLinear).apply
