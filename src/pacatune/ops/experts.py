"""The linear maps of a mixture of experts, of which the same R input columns are trained in each.

A router sends every token to a few of E experts. Sorted by expert, the S routed tokens (N tokens
times the number of experts of each) are one matrix whose groups of rows belong to one expert each:

    forward   y_e = x_e W'_e^T          W'_e = W_e, with W'_e[:, indices] += scaling * delta_e,
                                        rounded to the dtype of W where products are of 16 bits
    backward  dx_e = dy_e W'_e          d(delta_e) = scaling * dy_e^T x_e[:, indices]
    kept      x[:, indices], S * R elements

An expert that no token was sent to costs nothing and gets a gradient of zero. The weights are never
written: all experts together are the largest tensors of a model, and each step uses a part of them.

Two equal ways to form the products of all groups:

    per expert   one GEMM after the other
    grouped      torch's grouped GEMM, where it takes the dtype and the sizes
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pacatune.ops.columns import adapted_columns, put_columns_, read_columns
from pacatune.ops.linear import add_columns_, autocast, grad_delta
from pacatune.ops.row_groups import (
    by_group,
    check_indices,
    distinct_and_places,
    held_indices,
    hold_indices,
    is_spread_out,
    rank_of,
    select,
)
from pacatune.ops.tracing import refuse_second_derivative

__all__ = ["experts_linear", "paca_experts_linear", "paca_experts_update"]


def paca_experts_linear(
    x: Tensor,
    weight: Tensor,
    delta: Tensor,
    indices: Tensor,
    scaling: float,
    offsets: Tensor,
    *,
    is_transposed: bool = False,
    is_grouped: bool = False,
) -> Tensor:
    """Apply each expert's linear map to its tokens, training the columns `indices` of all.

    Saves x[:, indices], and references to the other arguments.

    Args:
        x: (S, I) activations of the routed tokens, sorted by expert.
        weight: (E, O, I) frozen pretrained weights.
        delta: (E, O, R) trained update of the columns.
        indices: (R,) int64, the trained columns, or (G, R) those of each row group.
        scaling: alpha / R.
        offsets: (E,) int32, where each expert's tokens end.
        is_transposed: The weights are (E, I, O).
        is_grouped: Use torch's grouped GEMM where it can be used.

    Returns:
        (S, O) activations; in the dtype of `weight` if grouped, otherwise of `x` or autocast.

    Raises:
        ValueError: If the shapes do not fit.

    Source: PaCA, Eqs. 7-9, for each expert.
    """
    _check_weight(x, weight, offsets, is_transposed)
    _check_delta(x, delta, indices, offsets)
    num_experts, out_features = len(weight), weight.shape[2 if is_transposed else 1]
    if delta.shape[:2] != (num_experts, out_features):
        raise ValueError(
            f"`delta` must be (E={num_experts}, O={out_features}, R={rank_of(indices)}) to fit "
            f"`weight` and `indices`, got shape {tuple(delta.shape)}."
        )
    x = x.to(weight.dtype) if is_grouped else autocast(x)
    return _ExpertsLinear.apply(
        x, weight, delta, indices, scaling, offsets, is_transposed, is_grouped
    )


def experts_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    is_transposed: bool = False,
    is_grouped: bool = False,
) -> Tensor:
    """Apply each expert's frozen linear map to its tokens; saves nothing but references.

    Args:
        x: (S, I) activations, sorted by expert.
        weight: (E, O, I) frozen weights.
        offsets: (E,) int32, where each expert's tokens end.
        is_transposed: The weights are (E, I, O).
        is_grouped: Use torch's grouped GEMM where it can be used.

    Returns:
        (S, O) activations, as from `paca_experts_linear`.

    Raises:
        ValueError: If the shapes do not fit.
    """
    _check_weight(x, weight, offsets, is_transposed)
    x = x.to(weight.dtype) if is_grouped else autocast(x)
    return _ExpertsLinear.apply(x, weight, None, None, 0.0, offsets, is_transposed, is_grouped)


def paca_experts_update(
    x: Tensor,
    delta: Tensor,
    indices: Tensor,
    scaling: float,
    offsets: Tensor,
    *,
    is_grouped: bool = False,
) -> Tensor:
    """Return what an adapter adds to `experts_linear`: x_e[:, indices] (scaling * delta_e)^T.

    For adapters beyond the first. Arguments as for `paca_experts_linear`.

    Returns:
        (S, O) in the dtype of `x`, or of autocast.

    Raises:
        ValueError: If the shapes do not fit.
    """
    _check_delta(x, delta, indices, offsets)
    return _ExpertsLinear.apply(
        autocast(x), None, delta, indices, scaling, offsets, False, is_grouped
    )


def _check_weight(x: Tensor, weight: Tensor, offsets: Tensor, is_transposed: bool) -> None:
    layout = "(E, I, O)" if is_transposed else "(E, O, I)"
    if weight.dim() != 3:
        raise ValueError(f"`weight` must be {layout}, got shape {tuple(weight.shape)}.")
    in_features = weight.shape[1 if is_transposed else 2]
    if x.dim() != 2 or x.shape[1] != in_features:
        raise ValueError(
            f"`x` must be (S, I={in_features}) to fit `weight` {tuple(weight.shape)}, "
            f"{layout}; got shape {tuple(x.shape)}."
        )
    if offsets.shape != (len(weight),) or offsets.dtype != torch.int32:
        raise ValueError(
            f"`offsets` must be (E={len(weight)},) int32 to fit `weight`, got shape "
            f"{tuple(offsets.shape)} of {offsets.dtype}."
        )


def _check_delta(x: Tensor, delta: Tensor, indices: Tensor, offsets: Tensor) -> None:
    check_indices(indices)
    if delta.dim() != 3 or len(delta) != len(offsets) or delta.shape[2] != rank_of(indices):
        raise ValueError(
            f"`delta` must be (E={len(offsets)}, O, R={rank_of(indices)}) to fit `offsets` and "
            f"`indices`, got shape {tuple(delta.shape)}."
        )
    check_indices(indices, delta.shape[1])


class _ExpertsLinear(torch.autograd.Function):
    """Eqs. 7-9 for groups of rows; without `weight` the update alone, without `delta` no update."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        delta: Tensor | None,
        indices: Tensor | None,
        scaling: float,
        offsets: Tensor,
        is_transposed: bool,
        is_grouped: bool,
    ) -> Tensor:
        needs_x, _, needs_delta, *_ = ctx.needs_input_grad
        ctx.call = x.shape, scaling, is_transposed, is_grouped
        x_R = None if delta is None or indices is None else select(x, indices)
        hold_indices(ctx, indices)
        # The parameters themselves and no views of them: DeepSpeed and FSDP2 take their memory away
        # after the forward pass and put it back before the backward pass.
        ctx.save_for_backward(
            x_R if needs_delta else None, weight if needs_x else None, delta, indices, offsets
        )
        if weight is None:
            assert x_R is not None
            assert delta is not None
            assert indices is not None
            return _column_products(x_R, delta, indices, offsets, is_grouped).mul_(scaling)
        weight_EOI = weight.transpose(1, 2) if is_transposed else weight
        y = _products(x, weight_EOI, offsets, is_grouped)
        if x_R is not None and delta is not None and indices is not None:
            if y.itemsize <= 2:
                columns = read_columns(weight_EOI, indices, dim=2, row_dim=1)
                adapted = adapted_columns(columns, delta, scaling)
                delta, scaling = torch.cat((adapted, columns.neg()), 2), 1.0
            y.add_(_column_products(x_R, delta, indices, offsets, is_grouped), alpha=scaling)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_second_derivative("paca_experts_linear")
        needs_x, _, needs_delta, *_ = ctx.needs_input_grad
        x_R, weight, delta_EOR, indices_R, offsets = ctx.saved_tensors
        indices_R = held_indices(ctx, indices_R)
        x_shape, scaling, is_transposed, is_grouped = ctx.call
        gx, gdelta, how = None, None, (offsets, is_grouped)
        gy = gy.contiguous()
        if needs_delta:
            options = offsets, scaling, delta_EOR.dtype
            gdelta = _grad_delta(gy, x_R, indices_R, *options, is_grouped)
        if needs_x:
            weight_EOI = weight.transpose(1, 2) if is_transposed and weight is not None else weight
            if weight_EOI is None:
                gx = gy.new_zeros(x_shape)
            else:
                gx = _products(gy, weight_EOI.transpose(1, 2), *how)
            if delta_EOR is not None and weight_EOI is not None and gy.itemsize <= 2:
                distinct, columns = _adapted(weight_EOI, delta_EOR, indices_R, scaling)
                gx.index_copy_(1, distinct, _products(gy, columns.transpose(1, 2), *how))
            elif delta_EOR is not None:
                distinct, update = _joined(delta_EOR, indices_R, x_shape[1])
                columns_SU = _products(gy, update.transpose(1, 2), *how)
                gx.index_add_(1, distinct, columns_SU, alpha=scaling)
        return gx, None, gdelta, None, None, None, None, None


def _column_products(
    x_SU: Tensor, delta: Tensor, indices: Tensor, offsets: Tensor, is_grouped: bool
) -> Tensor:
    """Return x_e[:, indices] delta_e^T of all experts: (S, O).

    An (E, O, 2R) `delta` is of the same inputs twice: the new columns and minus the old ones, as
    `column_update` has them.
    """
    if indices.dim() == 2 and not is_grouped and not torch.compiler.is_compiling():
        y = x_SU.new_zeros(len(x_SU), delta.shape[1])
        for expert, rows in _rows_of(offsets):  # one batched product for each
            add_columns_(y[rows], x_SU[rows], delta[expert].to(y.dtype), indices)
        return y
    inputs = _inputs_of_groups(x_SU, indices)
    if delta.shape[2] > rank_of(indices):
        inputs = [torch.cat((x_SR, x_SR), 1) for x_SR in inputs]
    pairs = zip(inputs, delta.chunk(len(inputs), 1), strict=True)
    return _side_by_side([_products(x_SR, rows, offsets, is_grouped) for x_SR, rows in pairs])


def _inputs_of_groups(x_SU: Tensor, indices: Tensor) -> Sequence[Tensor]:
    """Return the (S, R) inputs of each row group; without groups, `x_SU` itself."""
    return [x_SU] if indices.dim() == 1 else by_group(x_SU, indices).unbind(0)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """Return what the row groups' outputs are together, along dimension 1; one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _adapted(
    weight_EOI: Tensor, delta: Tensor, indices: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the (U,) columns that any row group trains, and W' there: (E, O, U)."""
    read = partial(read_columns, weight_EOI, dim=2, row_dim=1)
    adapted = adapted_columns(read(indices), delta, scaling)
    if indices.dim() == 1:
        return indices, adapted
    distinct, places = _distinct(indices, weight_EOI.shape[2])
    columns = read(distinct)
    put_columns_(columns, places, adapted, dim=2, row_dim=1)
    return distinct, columns


def _joined(delta: Tensor, indices: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """Return the same of an update, with zeros where a row group has no such column."""
    if indices.dim() == 1:
        return indices, delta
    distinct, places = _distinct(indices, in_features)
    joined = delta.new_zeros(*delta.shape[:2], len(distinct))
    put_columns_(joined, places, delta, dim=2, row_dim=1)
    return distinct, joined


def _distinct(indices: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    if is_spread_out(indices):  # all columns: a graph's sizes do not depend on values
        return torch.arange(in_features, device=indices.device), indices
    return distinct_and_places(indices)


def _products(x: Tensor, weight: Tensor, offsets: Tensor, is_grouped: bool) -> Tensor:
    """Return x_e weight_e^T of all groups: (S, I), (E, O, I) -> (S, O), in the dtype of x."""
    if is_grouped:
        weight = weight.to(x.dtype)
        if _can_group(x, weight):
            return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    if torch.compiler.is_compiling():
        return torch.ops.pacatune.experts_products(x, weight, offsets)
    return _products_per_expert(x, weight, offsets)


def _grad_delta(
    gy: Tensor,
    x: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scaling: float,
    dtype: torch.dtype,
    is_grouped: bool,
) -> Tensor:
    """Return scaling * dy_e^T x_e[:, indices] of all experts: (E, O, R); x is `select`'s."""
    if is_grouped:
        inputs = _inputs_of_groups(x, indices)
        pairs = list(zip(gy.chunk(len(inputs), 1), inputs, strict=True))
        if all(_can_group(*pair) for pair in pairs):
            parts = [F.grouped_mm(rows.t(), x_SR, offs=offsets) for rows, x_SR in pairs]
            return _side_by_side(parts).to(dtype).mul_(scaling)
    if torch.compiler.is_compiling():
        return torch.ops.pacatune.experts_grad_delta(gy, x, indices, offsets, scaling, dtype)
    return _grad_delta_per_expert(gy, x, indices, offsets, scaling, dtype)


_HAS_GROUPED = hasattr(F, "grouped_mm")  # of a newer torch than 2.6


def _can_group(*tensors: Tensor) -> bool:
    """Whether torch's grouped GEMM takes these: 16-byte rows, tensor cores of Ampere or newer."""
    x = tensors[0]
    if not _HAS_GROUPED or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    # inductor compiles it for bfloat16 only.
    if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:
        return False
    for tensor in tensors:  # and no generator expression, which torch 2.15 does not trace here
        # Of rows, and of a view: of a row group's, which a graph knows by its width alone.
        is_traced = torch.compiler.is_compiling()
        begin = tensor.shape[-1] if is_traced else tensor.storage_offset()
        starts = max(tensor.stride()[-2:]), begin
        if any(start * tensor.itemsize % 16 for start in starts) or 0 in tensor.shape:
            return False
    return True


def _rows_of(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield the experts that have tokens, and which."""
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if start < end:
            yield expert, slice(start, end)
        start = end


def _products_per_expert(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    y, end = x.new_empty(len(x), weight.shape[1]), 0
    for expert, rows in _rows_of(offsets):
        torch.mm(x[rows], weight[expert].to(x.dtype).t(), out=y[rows])
        end = rows.stop
    y[end:].zero_()
    return y


def _grad_delta_per_expert(
    gy: Tensor, x: Tensor, indices: Tensor, offsets: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    gdelta = gy.new_zeros(len(offsets), gy.shape[1], rank_of(indices), dtype=dtype)
    for expert, rows in _rows_of(offsets):
        gdelta[expert] = grad_delta(gy[rows], x[rows], scaling, dtype, indices)
    return gdelta


# A traced graph must not read the sizes of the groups, so it sees each loop as one operation.
_products_op = torch.library.custom_op(
    "pacatune::experts_products", _products_per_expert, mutates_args=()
)
_grad_delta_op = torch.library.custom_op(
    "pacatune::experts_grad_delta", _grad_delta_per_expert, mutates_args=()
)


@_products_op.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(len(x), weight.shape[1])


@_grad_delta_op.register_fake
def _(
    gy: Tensor, x: Tensor, indices: Tensor, offsets: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    return gy.new_empty(len(offsets), gy.shape[1], rank_of(indices), dtype=dtype)
