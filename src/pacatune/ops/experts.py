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

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pacatune.ops.columns import Update, adapted_columns, check_form, read_columns
from pacatune.ops.products import NOT_IN_CUDA_GRAPHS, autocast, grad_delta
from pacatune.ops.tracing import refuse_second_derivative


def paca_experts_linear(
    x: Tensor,
    weight: Tensor,
    update: Update,
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
        update: Of R columns of all; its delta is (E, O, R).
        offsets: (E,) int32, where each expert's tokens end.
        is_transposed: The weights are (E, I, O).
        is_grouped: Use torch's grouped GEMM where it can be used.

    Returns:
        (S, O) activations; in the dtype of `weight` if grouped, otherwise of `x` or autocast.

    Raises:
        ValueError: If the shapes do not fit.

    Source: PaCA, Eqs. 7-9, for each expert.
    """
    update = update.plain()
    _check_weight(x, weight, offsets, is_transposed)
    _check_delta(update, offsets)
    num_experts, out_features = len(weight), weight.shape[2 if is_transposed else 1]
    if update.delta.shape[:2] != (num_experts, out_features):
        raise ValueError(
            f"`delta` must be (E={num_experts}, O={out_features}, R) to fit `weight`, got shape "
            f"{tuple(update.delta.shape)}."
        )
    x = x.to(weight.dtype) if is_grouped else autocast(x)
    how = update.scaling, is_transposed, is_grouped
    return _ExpertsLinear.apply(x, weight, update.delta, update.indices, offsets, how)


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
    return _ExpertsLinear.apply(x, weight, None, None, offsets, (0.0, is_transposed, is_grouped))


def paca_experts_update(
    x: Tensor,
    update: Update,
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
    update = update.plain()
    _check_delta(update, offsets)
    how = update.scaling, False, is_grouped
    return _ExpertsLinear.apply(autocast(x), None, update.delta, update.indices, offsets, how)


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


def _check_delta(update: Update, offsets: Tensor) -> None:
    delta, indices, *_ = update
    if delta.dim() != 3 or len(delta) != len(offsets):
        raise ValueError(
            f"`delta` must be (E={len(offsets)}, O, R) to fit `offsets`, got shape "
            f"{tuple(delta.shape)}."
        )
    check_form(indices)
    if delta.shape[2] != len(indices):
        raise ValueError(
            f"`delta` is of {delta.shape[2]} columns, and `indices` has {len(indices)}."
        )


class _ExpertsLinear(torch.autograd.Function):
    """Eqs. 7-9 for groups of rows; without `weight` the update alone, without `delta` no update."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        delta: Tensor | None,
        indices: Tensor | None,
        offsets: Tensor,
        how: tuple[float, bool, bool],
    ) -> Tensor:
        needs_x, _, needs_delta, *_ = ctx.needs_input_grad
        ctx.call = x.shape, how
        scaling, is_transposed, is_grouped = how
        x_R = None if indices is None else x.index_select(-1, indices)
        # The parameters themselves and no views of them: DeepSpeed and FSDP2 take their memory away
        # after the forward pass and put it back before the backward pass.
        kept = x_R if needs_delta else None, weight if needs_x else None
        ctx.save_for_backward(*kept, delta, indices, offsets)
        y = None
        if weight is not None:
            weight = weight.transpose(1, 2) if is_transposed else weight
            y = _products(x, weight, offsets, is_grouped)
        if x_R is not None and delta is not None and indices is not None:
            if weight is not None and y is not None and y.itemsize <= 2:
                columns = read_columns(weight, indices, dim=2)
                adapted = adapted_columns(columns, delta, scaling)
                delta, scaling = torch.cat((adapted, columns.neg()), 2), 1.0
                x_R = torch.cat((x_R, x_R), 1)
            added = _products(x_R, delta, offsets, is_grouped)
            y = added.mul_(scaling) if y is None else y.add_(added, alpha=scaling)
        assert y is not None
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("paca_experts_linear")
        needs_x, _, needs_delta, *_ = ctx.needs_input_grad
        x_R, weight, delta, indices, offsets = ctx.saved_tensors
        x_shape, (scaling, is_transposed, is_grouped) = ctx.call
        gx, gdelta, how = None, None, (offsets, is_grouped)
        gy = gy.contiguous()
        if needs_delta:
            gdelta = _grad_delta(gy, x_R, offsets, scaling, delta.dtype, is_grouped)
        if needs_x:
            weight = weight.transpose(1, 2) if is_transposed and weight is not None else weight
            if weight is None:
                gx = gy.new_zeros(x_shape)
            else:
                gx = _products(gy, weight.transpose(1, 2), *how)
            if delta is not None:
                if weight is not None and gy.itemsize <= 2:  # the columns of W' as they are
                    update = adapted_columns(read_columns(weight, indices, dim=2), delta, scaling)
                    gx.index_copy_(1, indices, _products(gy, update.transpose(1, 2), *how))
                else:
                    gx_SR = _products(gy, delta.transpose(1, 2), *how)
                    gx.index_add_(1, indices, gx_SR, alpha=scaling)
        return gx, None, gdelta, None, None, None


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
    x_SR: Tensor,
    offsets: Tensor,
    scaling: float,
    dtype: torch.dtype,
    is_grouped: bool,
) -> Tensor:
    """Return scaling * dy_e^T x_e[:, indices] of all experts: (E, O, R)."""
    if is_grouped and _can_group(gy, x_SR):
        return F.grouped_mm(gy.t(), x_SR, offs=offsets).to(dtype).mul_(scaling)
    if torch.compiler.is_compiling():
        return torch.ops.pacatune.experts_grad_delta(gy, x_SR, offsets, scaling, dtype)
    return _grad_delta_per_expert(gy, x_SR, offsets, scaling, dtype)


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
        if max(tensor.stride()[-2:]) * tensor.itemsize % 16 or 0 in tensor.shape:
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
    gy: Tensor, x: Tensor, offsets: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    gdelta = gy.new_zeros(len(offsets), gy.shape[1], x.shape[1], dtype=dtype)
    for expert, rows in _rows_of(offsets):
        gdelta[expert] = grad_delta(gy[rows], x[rows], scaling, dtype)
    return gdelta


# A traced graph must not read the sizes of the groups, so it sees each loop as one operation.
_products_op = torch.library.custom_op(
    "pacatune::experts_products", _products_per_expert, mutates_args=(), **NOT_IN_CUDA_GRAPHS
)
_grad_delta_op = torch.library.custom_op(
    "pacatune::experts_grad_delta", _grad_delta_per_expert, mutates_args=(), **NOT_IN_CUDA_GRAPHS
)


@_products_op.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(len(x), weight.shape[1])


@_grad_delta_op.register_fake
def _(gy: Tensor, x: Tensor, offsets: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    return gy.new_empty(len(offsets), gy.shape[1], x.shape[1], dtype=dtype)
