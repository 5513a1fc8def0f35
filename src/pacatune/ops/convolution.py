"""The hand-written gradients of PaCA for convolutions: R input channels of a kernel are trained.

A convolution is the linear map of `linear.py` applied to patches, so what is kept shrinks alike:

    nn.ConvNd, trained or frozen      keeps x              B * I * positions elements
    PaCA, R input channels trained    keeps x[:, indices]  B * R * positions elements

Kernels are small against activations, so the adapted kernel is a copy that lives as long as one
convolution runs, in the forward pass and again in the backward pass: nobody ever sees anything but
the pretrained weight, which is never written. With G groups an input channel meets the O/G outputs
of its own group only, and its column of the update is that high: delta is (O/G, R, *k).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pacatune.ops.columns import (
    CONVOLUTIONS,
    Size,
    Update,
    adapted_kernel,
    check_form,
    one_group_each,
    outputs_of,
    select_channels,
)
from pacatune.ops.products import autocast, cast
from pacatune.ops.tracing import refuse_second_derivative

Geometry = tuple[list[int], list[int], list[int], int]
"""Stride, padding and dilation, each per dimension, and the number of groups."""
_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def paca_conv(
    x: Tensor,
    weight: Tensor,
    update: Update,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Apply a convolution that trains only the kernel's input channels `indices`.

    Forward   y = conv(x, W') + b       W' = W with scaling * delta added in the channels' columns
    Backward  dx = conv^T(dy, W')       d(delta) = scaling * correlation of dy and x[:, indices]
    Saves x[:, indices] (with the row of zeros that an uneven "same" adds): R/I of what nn.ConvNd
    keeps, even of a frozen one, and references to W, delta and indices. Costs a copy of the kernel
    in each direction, freed when its convolution is done. `weight` is the pretrained one and is
    never written, so whoever looks at it at any time sees the pretrained weight.

    Args:
        x: (B, I, *positions) or (I, *positions) activations, 1 to 3 spatial dimensions; an empty
            batch included.
        weight: (O, I/G, *k) frozen pretrained kernel.
        update: Of R of all I input channels. Entry [o, j] of its (O/G, R, *k) delta updates the
            kernel from channel indices[j] to output o of that channel's group. G = 1 makes it
            (O, R, *k), a depthwise convolution (multiplier, R, *k).
        bias: (O,) bias, frozen or trained.
        stride: As F.conv2d takes it, and so are the others.
        padding: Zeros on both sides, or "same" or "valid".
        dilation: Steps between the kernel's taps.
        groups: G.

    Returns:
        (B, O, *positions) or (O, *positions), channels-last if x is.

    Raises:
        ValueError: If the shapes of `x`, `weight`, `update` and `bias` do not fit, or
            `padding` is neither numbers nor one of the two names.

    Source: PaCA, Eqs. 7-9, for the linear map of each patch.
    """
    update = update.plain()
    num_dims = _check_shapes(x, weight, update, bias, groups)
    stride, dilation = _expand(stride, num_dims), _expand(dilation, num_dims)
    x, padding = _resolve_padding(autocast(x), weight.shape[2:], padding, stride, dilation)
    how = update.scaling, (stride, padding, dilation, groups)
    batch = x if x.dim() == num_dims + 2 else x.unsqueeze(0)
    y: Tensor = _PacaConv.apply(batch, weight, update.delta, update.indices, bias, how)
    return y if batch is x else y.squeeze(0)


class _PacaConv(torch.autograd.Function):
    """`paca_conv` for a batch, given the scaling and the geometry."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        delta: Tensor,
        indices: Tensor,
        bias: Tensor | None,
        how: tuple[float, Geometry],
    ) -> Tensor:
        scaling, geometry = how
        needs_x, _, needs_delta, *_ = ctx.needs_input_grad
        num_dims = x.dim() - 2
        dtype = x.dtype if torch.is_autocast_enabled(x.device.type) else weight.dtype
        memory_format = _memory_format(x)
        ctx.call = x.shape, scaling, geometry, memory_format
        x_R = select_channels(x, indices, num_dims) if needs_delta else None
        # As in `paca_linear`, `delta` is saved where only its version is read, too.
        ctx.save_for_backward(x_R, weight if needs_x else None, delta, indices)
        update = Update(delta, indices, scaling)
        kernel = adapted_kernel(weight, update, geometry[-1], dtype, memory_format)
        bias = None if bias is None else cast(bias, dtype)
        return CONVOLUTIONS[num_dims](x, kernel, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("paca_conv")
        needs_x, _, needs_delta, _, needs_bias, _ = ctx.needs_input_grad
        x_R, weight, delta, indices = ctx.saved_tensors
        x_shape, scaling, geometry, memory_format = ctx.call
        gx = gdelta = gbias = None
        update = Update(delta, indices, scaling)
        if needs_delta:
            gdelta = _grad_delta(gy, x_R, update, geometry, x_shape[1])
        if needs_x:
            kernel = adapted_kernel(weight, update, geometry[-1], gy.dtype, memory_format)
            x = _shape_of_input(gy, kernel, x_shape)
            gx = _convolution_backward(gy, x, kernel, geometry, (True, False))[0]
        if needs_bias:
            gbias = gy.sum([0, *range(2, gy.dim())])
        return gx, None, gdelta, None, gbias, None


def _grad_delta(
    gy: Tensor, x_R: Tensor, update: Update, geometry: Geometry, in_channels: int
) -> Tensor:
    """Return d(delta), (O/G, R, *k): one group for each trained channel where there are groups."""
    delta, indices, scaling, _ = update
    *sizes, groups = geometry
    kernel = torch.empty_like(delta, dtype=gy.dtype)  # only its shape is read
    if groups == 1:
        gdelta = _convolution_backward(gy, x_R, kernel, geometry, (False, True))[1]
    else:
        rank = len(indices)
        outputs = outputs_of(indices, in_channels // groups, len(delta))
        gy_R = select_channels(gy, outputs, gy.dim() - 2)
        each = one_group_each(kernel)
        geach = _convolution_backward(gy_R, x_R, each, (*sizes, rank), (False, True))[1]
        gdelta = geach.squeeze(1).unflatten(0, (rank, -1)).transpose(0, 1)
    return gdelta.to(delta.dtype).contiguous().mul_(scaling)


def _shape_of_input(gy: Tensor, kernel: Tensor, shape: torch.Size) -> Tensor:
    """Return a tensor of which a backward pass may read the shape alone, at the least cost."""
    # torch 2.6 lets no compiled backward pass ask for an order.
    if gy.device.type != "cpu" or torch.compiler.is_compiling():
        return gy.new_empty(1).expand(shape)
    # CPU kernels would copy it into their own order. Nobody touches the pages of an empty one.
    last = _CHANNELS_LAST.get(gy.dim() - 2)
    is_last = last in (_memory_format(gy), _memory_format(kernel))
    memory_format = last if is_last and last is not None else torch.contiguous_format
    return torch.empty(shape, dtype=gy.dtype, device=gy.device, memory_format=memory_format)


def _convolution_backward(
    gy: Tensor, x: Tensor, kernel: Tensor, geometry: Any, mask: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the kernel, those of `mask`."""
    stride, padding, dilation, groups = geometry
    sizes = (stride, padding, dilation, False, [0] * len(stride), groups)
    gradients = torch.ops.aten.convolution_backward(gy, x, kernel, None, *sizes, [*mask, False])
    return gradients[0], gradients[1]


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = _CHANNELS_LAST.get(x.dim() - 2)
    if channels_last is None or x.is_contiguous():
        return torch.contiguous_format
    is_last = x.is_contiguous(memory_format=channels_last)
    return channels_last if is_last else torch.preserve_format


def _expand(size: Size, num_dims: int) -> list[int]:
    if isinstance(size, int):
        return [size] * num_dims
    return list(size) * num_dims if len(size) == 1 else list(size)


def _resolve_padding(
    x: Tensor, kernel_size: torch.Size, padding: Size | str, stride: list[int], dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """Turn "same" and "valid" into numbers; where "same" is uneven, x gets the odd zeros here."""
    num_dims = len(dilation)
    if padding == "valid":
        return x, [0] * num_dims
    if padding != "same":
        if isinstance(padding, str):
            raise ValueError(f"`padding` ({padding!r}) must be 'same', 'valid' or numbers.")
        return x, _expand(padding, num_dims)
    if any(step != 1 for step in stride):
        raise ValueError(f"`padding` 'same' needs stride 1, got stride={tuple(stride)}.")
    totals = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    if any(total % 2 for total in totals):  # F.pad wants the last dimension first
        x = F.pad(x, [side for total in reversed(totals) for side in (0, total % 2)])
    return x, [total // 2 for total in totals]


def _check_shapes(
    x: Tensor,
    weight: Tensor,
    update: Update,
    bias: Tensor | None,
    groups: int,
) -> int:
    """Return the number of spatial dimensions."""
    delta, indices, *_ = update
    num_dims = weight.dim() - 2
    if num_dims not in CONVOLUTIONS or weight.shape[0] % groups:
        raise ValueError(
            f"`weight` must be (O, I/G, *k) with 1 to 3 kernel dimensions and O a multiple of "
            f"groups={groups}, got shape {tuple(weight.shape)}."
        )
    out_channels, in_channels = weight.shape[0], weight.shape[1] * groups
    if x.dim() not in (num_dims + 1, num_dims + 2) or x.shape[-num_dims - 1] != in_channels:
        raise ValueError(
            f"`x` must be (B, I={in_channels}, *positions) or without B, to fit `weight` "
            f"{tuple(weight.shape)} with groups={groups}, got shape {tuple(x.shape)}."
        )
    check_form(indices)
    expected = (out_channels // groups, len(indices), *weight.shape[2:])
    if delta.shape != expected:
        raise ValueError(
            f"`delta` must be (O/G, R, *k) = {expected} to fit `weight` and `indices`, got shape "
            f"{tuple(delta.shape)}."
        )
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"`bias` must be (O={out_channels},), got shape {tuple(bias.shape)}.")
    return num_dims
