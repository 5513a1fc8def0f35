"""The hand-written gradients of PaCA: one linear map of which R input columns are trained.

Per layer, with N tokens, I input and O output features, plain autograd and PaCA differ only in what
they keep:

    nn.Linear, all columns trained    keeps x              N * I elements
    LoRA of rank R                    keeps x and x A^T    N * (I + R) elements
    PaCA, R columns trained           keeps x[:, indices]  N * R elements
    PaCA, R columns in G row groups   keeps the U distinct ones, N * U elements, U <= G R

and all three run the same two large GEMMs (y = x W^T, dx = dy W). PaCA adds one gather in the
forward pass and one thin GEMM in the backward pass; nothing runs in sequence with the large GEMMs.
`ops/reference.py` states the same equations in plain autograd; the tests hold the two together.
"""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pacatune.ops.columns import adapted_columns, read_columns
from pacatune.ops.row_groups import (
    by_group,
    by_rows,
    check_indices,
    distinct_and_places,
    held_indices,
    hold_indices,
    is_spread_out,
    kept_columns,
    num_groups_of,
    places_in,
    rank_of,
    row_index,
    select,
)
from pacatune.ops.tracing import refuse_second_derivative

__all__ = ["Elementwise", "Source", "column_update", "paca_linear", "paca_linear_additive"]

Result = TypeVar("Result")


class Source(Protocol):
    """Where a backward pass finds its weight again, which its forward has therefore not saved."""

    def backward(self, compute: Callable[[Tensor, bool], Result]) -> Result:
        """Return compute(weight, is_resident) on the weight that the forward pass saw.

        Args:
            compute: Takes the (O, I) weight, and whether the adapted columns are in it now.
        """


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


def paca_linear(
    x: Tensor,
    weight: Tensor,
    delta: Tensor,
    indices: Tensor,
    scaling: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply a linear map that trains only the input columns `indices` (Eqs. 7-9).

    Forward   y = x W'^T + b            W' already holds the adapted columns
    Backward  dx = dy W'                d(delta) = scaling * dy^T x[..., indices]
    Saves x[..., indices]: R/I of what nn.Linear keeps, and references to W', delta and indices.
    With row groups, group g of the outputs trains columns indices[g], and their distinct ones are
    saved; see `row_groups`.

    The columns of `weight` must be W[:, indices] + scaling * delta when this is called and when the
    backward pass runs; both read them there.

    Args:
        x: (..., I) activations, any number of leading dimensions, zero tokens included.
        weight: (O, I) frozen weight with the adapted columns written in.
        delta: (O, R) trained update of the columns, any floating dtype; receives the gradient.
        indices: (R,) int64, the trained columns, or (G, R) those of each row group.
        scaling: alpha / R, the factor between `delta` and the columns.
        bias: (O,) bias, frozen or trained.

    Returns:
        (..., O) activations in the dtype of `x`, or of autocast where that is on.

    Raises:
        ValueError: If the shapes of `x`, `weight`, `delta`, `indices` and `bias` do not fit.

    Source: PaCA, Eqs. 7-9, with the columns written as W + scaling * delta.
    """
    _check_shapes(x, weight, delta, indices, bias)
    return _PacaLinear.apply(autocast(x), weight, delta, indices, scaling, bias, True)


def paca_linear_additive(
    x: Tensor,
    weight: Tensor,
    delta: Tensor,
    indices: Tensor,
    scaling: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply the same map as `paca_linear`, from the *pretrained* weight, which is not written.

    Forward   y = x W^T + b + x[..., indices] (scaling * delta)^T
    Backward  dx = dy W + (dy scaling * delta in the columns)    d(delta) as in `paca_linear`
    Saves the same. Costs one thin GEMM more in each direction and saves writing the columns, which
    takes longer when there are few tokens.

    Args:
        x: (..., I) activations.
        weight: (O, I) frozen pretrained weight.
        delta: (O, R) trained update of the columns.
        indices: (R,) int64, the trained columns, or (G, R) those of each row group.
        scaling: alpha / R.
        bias: (O,) bias, frozen or trained.

    Returns:
        (..., O) activations in the dtype of `x`, or of autocast where that is on.

    Raises:
        ValueError: If the shapes of `x`, `weight`, `delta`, `indices` and `bias` do not fit.

    Source: PaCA, Eqs. 7-9, distributed over the sum W + scaling * delta.
    """
    _check_shapes(x, weight, delta, indices, bias)
    return _PacaLinear.apply(autocast(x), weight, delta, indices, scaling, bias, False)


def autocast(x: Tensor) -> Tensor:
    """Cast an input as torch.autocast does for linear layers, if it is on."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.is_floating_point() and x.itemsize < 8:
        return x.to(torch.get_autocast_dtype(device_type))
    return x


def owned(y: Tensor) -> Tensor:
    """Return `y` as its own tensor, no copy: what a Function returns as a view is read-only."""
    # Compilers know how to make their own.
    return y if torch.compiler.is_compiling() or not y._is_view() else y.data


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
    check_indices(indices, out_features)
    if delta.shape != (out_features, rank_of(indices)):
        raise ValueError(
            f"`delta` must be (O={out_features}, R={rank_of(indices)}) to fit `weight` and "
            f"`indices`, got shape {tuple(delta.shape)}."
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"`bias` must be (O={out_features},), got shape {tuple(bias.shape)}.")


def column_update(
    weight: Tensor, delta: Tensor, indices: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    """Return what the columns of W' multiply x with beyond those of W, for `add_columns_`.

    In 16 bits W' is rounded, and updates of less than half a unit in its last place are lost. Their
    difference may have more than 16 bits, so both are returned, the new columns and minus the old
    ones: a model is one function, whether its columns are in the weight, beside it or merged.

    Args:
        weight: (O, I) pretrained weight.
        delta: (O, R) trained update.
        indices: (R,) int64, the trained columns, or (G, R) those of each row group.
        scaling: alpha / R.
        dtype: What the product is computed in.

    Returns:
        In 16 bits (O, 2R), otherwise (O, R) scaling * delta; in `dtype`.
    """
    if dtype.itemsize > 2:
        wide = _cast(delta, dtype)
        return wide if scaling == 1.0 else wide * scaling
    columns = read_columns(weight, indices)
    adapted = adapted_columns(columns, delta, scaling)
    return torch.cat((_cast(adapted, dtype), _cast(columns, dtype).neg()), 1)


class _PacaLinear(torch.autograd.Function):
    """Eqs. 7-9 in both forms; the first six arguments as in `paca_linear`.

    `is_resident` says whether `weight` holds the adapted columns now. With a `source`, the backward
    pass asks it for the weight; otherwise the weight is saved and must stay as it is.

    With an `activation` the layer is applied to act(gate) * x, of which nothing is kept: gate and x
    are kept by their product anyway, 2 I elements per token, and two columns of them give one of it
    again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        delta: Tensor,
        indices: Tensor,
        scaling: float,
        bias: Tensor | None,
        is_resident: bool,
        source: Source | None = None,
        activation: Elementwise | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        needs_x, _, needs_delta, *_, needs_gate = ctx.needs_input_grad
        ctx.call = x.shape, scaling, is_resident, source, activation
        kept = x_R = None
        if activation is not None and gate is not None:
            kept, x = x, activation.product(gate, x)
        if (needs_delta and kept is None) or not is_resident:
            x_R = select(x, indices)
        # `delta` is saved even where only its version is read: an in-place change between forward
        # and backward then raises torch's own error instead of giving a mixed gradient.
        if indices.dim() == 2:
            hold_indices(ctx, indices)
        ctx.save_for_backward(
            x_R if kept is None and needs_delta else kept,
            weight if (needs_x or needs_gate) and source is None else None,
            delta,
            indices,
            gate,
        )
        y = owned(F.linear(x, weight, bias))
        if x_R is not None and not is_resident:
            add_columns_(y, x_R, column_update(weight, delta, indices, scaling, y.dtype), indices)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_second_derivative("paca_linear")
        needs_x, _, needs_delta, _, _, needs_bias, *_, needs_gate = ctx.needs_input_grad
        kept, weight_OI, delta_OR, indices_R, gate = ctx.saved_tensors
        if indices_R.dim() == 2:
            indices_R = held_indices(ctx, indices_R)
        x_shape, scaling, is_resident, source, activation = ctx.call
        gy_NO = gy if gy.dim() == 2 else gy.reshape(-1, gy.shape[-1])
        gx = gdelta = gbias = ggate = None
        if needs_delta:
            x_NR = kept
            if activation is not None:
                columns = kept_columns(indices_R, x_shape[-1])
                pair = gate, kept
                x_NR = (
                    activation.product(*pair)
                    if columns is None
                    else activation.product_columns(*pair, columns)
                )
            if len(x_shape) != 2:
                x_NR = x_NR.flatten(0, len(x_shape) - 2) if len(x_shape) > 2 else x_NR.unsqueeze(0)
            gdelta = grad_delta(gy_NO, x_NR, scaling, delta_OR.dtype, indices_R)
        if needs_x or needs_gate:
            if source is None:
                gx_NI = grad_x(gy_NO, delta_OR, indices_R, scaling, weight_OI, is_resident)
            else:
                gx_NI = source.backward(partial(grad_x, gy_NO, delta_OR, indices_R, scaling))
            gx = gx_NI.view(x_shape)
            if activation is not None:
                ggate, gx = activation.owned_product_gradients(gx, gate, kept)
        if needs_bias:
            gbias = gy_NO.sum(0)
        return gx, None, gdelta, None, None, gbias, None, None, None, ggate


def add_columns_(y: Tensor, x_R: Tensor, update: Tensor, indices: Tensor) -> Tensor:
    """Add to the (..., O) product of the pretrained weight, in place, what `column_update` says.

    `x_R` is what `select` returns for `indices`.
    """
    y_NO = y.view(-1, y.shape[-1])
    x_NR = _cast(x_R, y.dtype).reshape(y_NO.shape[0], *x_R.shape[y.dim() - 1 :])
    if indices.dim() == 2:
        _add_group_columns_(y_NO, by_group(x_NR, indices), update)
        return y
    if update.shape[1] > x_NR.shape[1]:
        x_NR = torch.cat((x_NR, x_NR), 1)
    y_NO.addmm_(x_NR, update.t())
    return y


def add_columns(
    y: Tensor, x_GR: Tensor, weight: Tensor, delta: Tensor, indices: Tensor, scaling: float
) -> Tensor:
    """Return what `add_columns_` makes of (..., O), by operations that autograd knows.

    `x_GR` is (..., G R), the inputs of one row group after the other.
    """
    update = column_update(weight, delta, indices, scaling, y.dtype)
    groups = num_groups_of(indices)
    x_NGR = x_GR.reshape(-1, groups, rank_of(indices))
    if update.shape[1] > x_NGR.shape[2]:
        x_NGR = torch.cat((x_NGR, x_NGR), 2)
    y_NO = y.reshape(-1, y.shape[-1])
    if groups == 1:
        return torch.addmm(y_NO, x_NGR.flatten(1), update.t()).view(y.shape)
    update_GRo = update.unflatten(0, (groups, -1)).transpose(1, 2)
    added = torch.baddbmm(by_rows(y_NO, groups), x_NGR.transpose(0, 1), update_GRo)
    return added.transpose(0, 1).reshape(y.shape)


def _add_group_columns_(y_NO: Tensor, x_GNR: Tensor, update: Tensor) -> None:
    """Add the products of all row groups by one batched GEMM, in place."""
    groups = len(x_GNR)
    if update.shape[1] > x_GNR.shape[2]:
        x_GNR = torch.cat((x_GNR, x_GNR), 2)
    update_GRo = update.unflatten(0, (groups, -1)).transpose(1, 2)
    if torch.compiler.is_compiling():  # which cannot change such a view
        y_NO.add_(x_GNR.bmm(update_GRo).transpose(0, 1).flatten(1))
    else:
        by_rows(y_NO, groups).baddbmm_(x_GNR, update_GRo)


def grad_x(
    gy_NO: Tensor,
    delta_OR: Tensor,
    indices_R: Tensor,
    scaling: float,
    weight_OI: Tensor,
    is_resident: bool,
) -> Tensor:
    """Return dy W' as (N, I), from a weight that holds the adapted columns or not (Eq. 8)."""
    is_cast = weight_OI.dtype != gy_NO.dtype  # under autocast
    gx_NI = gy_NO.mm(weight_OI.to(gy_NO.dtype) if is_cast else weight_OI)
    if not is_resident:
        update = column_update(weight_OI, delta_OR, indices_R, scaling, gy_NO.dtype)
        if indices_R.dim() == 2:
            _add_grad_groups_(gx_NI, gy_NO, weight_OI, update, indices_R)
        else:
            add_grad_columns_(gx_NI, gy_NO, update, indices_R)
    return gx_NI


def _add_grad_groups_(
    gx_NI: Tensor, gy_NO: Tensor, weight: Tensor, update: Tensor, indices: Tensor
) -> None:
    """Do the same for row groups, by an update of their U distinct columns.

    So a column of dx that several groups reach is summed in one product and rounded once. It costs
    U/I of the large product, only where columns are not resident.
    """
    if is_spread_out(indices):  # all columns: a graph's sizes do not depend on values
        distinct, places = torch.arange(weight.shape[1], device=weight.device), indices
    else:
        distinct, places = distinct_and_places(indices)
    places = row_index(places, (len(weight), len(distinct)))
    if update.shape[1] == rank_of(indices):
        joined = update.new_zeros(len(weight), len(distinct)).scatter_(1, places, update)
        gx_NI.index_add_(1, distinct, _thin_product(gy_NO, joined))
    else:  # those of W' as they are
        columns = _cast(weight.index_select(1, distinct), update.dtype)
        columns.scatter_(1, places, update[:, : rank_of(indices)])
        gx_NI.index_copy_(1, distinct, _thin_product(gy_NO, columns))


def add_grad_columns_(gx_NI: Tensor, gy_NO: Tensor, update: Tensor, indices_R: Tensor) -> None:
    """Make dy W, in place, dy W' by what `column_update` says."""
    rank = indices_R.shape[0]
    if update.shape[1] == rank:
        gx_NI.index_add_(1, indices_R, _thin_product(gy_NO, update))
    else:  # those of W' as they are
        gx_NI.index_copy_(1, indices_R, _thin_product(gy_NO, update[:, :rank]))


def _thin_product(gy_NO: Tensor, update_OR: Tensor) -> Tensor:
    """Return dy update as (N, R), by the faster order."""
    if torch.compiler.is_compiling() or not _is_on_cpu(gy_NO):
        return gy_NO.mm(update_OR)
    if _is_faster_transposed(gy_NO, update_OR.shape[1]):
        return update_OR.t().mm(gy_NO.t()).t()
    return gy_NO.mm(update_OR)


def grad_delta(
    gy_NO: Tensor,
    x_NR: Tensor,
    scaling: float,
    dtype: torch.dtype,
    indices: Tensor | None = None,
) -> Tensor:
    """Return scaling * dy^T x as (O, R) in the dtype of delta (Eq. 9).

    `x_NR` is what `select` returned for `indices`, which matter where they are of row groups: each
    group's outputs then meet its own inputs, in one batched GEMM or in that of all kept columns.

    On GPUs one GEMM, which scales, and which stores the dtype of delta where torch has such a one.
    On CPUs with many tokens for the rank computed as (x^T dy)^T, which is faster there. Compilers
    fuse what follows a product.
    """
    if indices is not None and indices.dim() == 2:
        return _grad_delta_of_groups(gy_NO, x_NR, indices, scaling, dtype)
    if not _is_on_cpu(gy_NO) and not torch.compiler.is_compiling():
        return _scaled_product(gy_NO.t(), x_NR, scaling, dtype)
    return _finished(_plain_product(gy_NO, x_NR), scaling, dtype)


def _plain_product(gy_NO: Tensor, x_NR: Tensor) -> Tensor:
    """Return dy^T x as (O, R), on CPUs by the faster order."""
    if _is_on_cpu(gy_NO) and _is_faster_transposed(gy_NO, x_NR.shape[1]):
        return x_NR.t().mm(gy_NO).t()
    return gy_NO.t().mm(x_NR)


def _finished(gdelta: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    gdelta = gdelta.to(dtype, memory_format=torch.contiguous_format)
    return gdelta if scaling == 1.0 else gdelta.mul_(scaling)


def _grad_delta_of_groups(
    gy_NO: Tensor, x_NR: Tensor, indices: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    is_plain = _is_on_cpu(gy_NO) or torch.compiler.is_compiling()
    (groups, rank), num_rows = indices.shape, gy_NO.shape[1]
    joined = _num_joined(indices, math.prod(x_NR.shape[1:]), gy_NO)
    if joined == groups and x_NR.dim() == 2:
        places = row_index(places_in(x_NR, indices), (num_rows, x_NR.shape[1]))
        if is_plain:
            return _finished(_plain_product(gy_NO, x_NR).gather(1, places), scaling, dtype)
        return _scaled_product(gy_NO.t(), x_NR, scaling, dtype).gather(1, places)
    x_GNR = by_group(x_NR, indices, joined)
    gy_GNo = by_rows(gy_NO, len(x_GNR))
    if is_plain:
        each = x_GNR.transpose(1, 2).bmm(gy_GNo).transpose(1, 2)
    else:
        each = _scaled_product(gy_GNo.transpose(1, 2), x_GNR, scaling, dtype)
    parts = each.view(len(each), joined, num_rows // groups, joined, rank)
    own = parts.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    return (_finished(own, scaling, dtype) if is_plain else own).flatten(0, 2)


def _num_joined(indices: Tensor, num_kept: int, gy_NO: Tensor) -> int:
    """Return how many groups share a product, of which each reads its part; G: all kept columns.

    The groups' own N G R inputs must not be many more than those kept. Products of 8 columns and 8
    rows take CPUs longer than a quarter as many of 32 and 32 do.
    """
    groups, rank = indices.shape
    if groups * rank > 8 * num_kept:
        return groups
    if not _is_on_cpu(gy_NO):
        return 1
    joined = max(min(32 // max(rank, 1), 64 * groups // max(gy_NO.shape[1], 1), groups), 1)
    while groups % joined:
        joined -= 1
    return joined


def _scaled_product(a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return scaling * a b in `dtype` by one GEMM, and a cast where no GEMM ends in that dtype."""
    if dtype.itemsize > a.itemsize and _can_widen(a.device, a.dtype, dtype):
        return _wide_product(a, b, scaling, dtype)
    return _cast(
        (a.mm if a.dim() == 2 else a.bmm)(b) if scaling == 1.0 else _addmm(a, b, scaling), dtype
    )


def _addmm(a: Tensor, b: Tensor, scaling: float, **options: Any) -> Tensor:
    """Return scaling * a b; the tensor that addmm adds to is not read, and has one element."""
    nothing = a.new_empty(()).expand(*a.shape[:-1], b.shape[-1])
    add = torch.addmm if a.dim() == 2 else torch.baddbmm
    return add(nothing, a, b, beta=0, alpha=scaling, **options)


def _wide_product(a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return scaling * a b in a wider `dtype`, without rounding to that of a and b in between."""
    if scaling == 1.0:
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=dtype)
    return _addmm(a, b, scaling, out_dtype=dtype)


@functools.cache
def _can_widen(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Whether `_wide_product` works there: torch 2.8 has it, for some devices and dtypes.

    Found out by trying it once, on tensors large enough for any alignment that a GEMM may ask for.
    """
    one = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        return all(
            _wide_product(ones, ones, scaling, wide).dtype == wide
            for ones in (one, one.unsqueeze(0))  # batched, too
            for scaling in (1.0, 2.0)
        )
    except (TypeError, RuntimeError):  # no such option; no such kernel
        return False


def _is_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"  # torch 2.6 compiles no `is_cpu` in a backward pass


def _is_faster_transposed(gy_NO: Tensor, rank: int) -> bool:
    """Whether a CPU multiplies (N, O) with R columns faster as (B^T A^T)^T than as A B.

    It does if all of dy is read once for R rows instead of R columns, and these rows are long.
    """
    # A compiler would make a graph for few tokens, and one for many.
    return gy_NO.itemsize > 2 or torch.compiler.is_compiling() or gy_NO.shape[0] >= rank * 8


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


# The unchecked form of both functions, for hot paths: Function.apply without its first half, which
# takes as long as the second and refuses torch.func's transforms. The caller sees to both.
apply_paca_linear: Callable[..., Tensor] = super(torch.autograd.Function, _PacaLinear).apply
