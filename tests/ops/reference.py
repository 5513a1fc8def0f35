"""The equations of PaCA in plain autograd: slow, obvious, and the oracle of every test.

Nothing here is fast or lean: the adapted weight is built as a new tensor in every call, so autograd
sees an ordinary linear layer whose weight depends on `delta`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def adapted_weight(weight: Tensor, delta: Tensor, indices: Tensor, scaling: float) -> Tensor:
    """Return W' = W with W'[:, indices] = W[:, indices] + scaling * delta (Eq. 7).

    Args:
        weight: (O, I) pretrained weight.
        delta: (O, R) update of the columns; differentiable.
        indices: (R,) int64 columns.
        scaling: alpha / R.

    Returns:
        (O, I) in the dtype of `weight`. The sum is formed in the wider of the two dtypes and
        rounded once.
    """
    columns = weight[:, indices] + scaling * delta
    return weight.index_copy(1, indices, columns.to(weight.dtype))


def paca_linear(
    x: Tensor,
    weight: Tensor,
    delta: Tensor,
    indices: Tensor,
    scaling: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply the adapted linear map, starting from the *pretrained* weight (Eqs. 7-9 by autograd).

    Args:
        x: (..., I) activations.
        weight: (O, I) pretrained weight, without the adapted columns.
        delta: (O, R) update of the columns.
        indices: (R,) int64 columns.
        scaling: alpha / R.
        bias: (O,) bias.

    Returns:
        (..., O) activations.
    """
    weight = adapted_weight(weight, delta, indices, scaling)
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.itemsize < 8:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return F.linear(x, weight, bias)


def adapted_kernel(
    weight: Tensor,
    delta: Tensor,
    indices: Tensor,
    scaling: float,
    groups: int = 1,
) -> Tensor:
    """Return W', a convolution's kernel with scaling * delta added to some input channels.

    Args:
        weight: (O, I/G, *k) pretrained kernel.
        delta: (O/G, R, *k) update of the input channels; differentiable.
        indices: (R,) int64 of the I input channels.
        scaling: alpha / R.
        groups: G; input channel i leads to the outputs of its own group only.

    Returns:
        (O, I/G, *k) in the dtype of `weight`.
    """
    in_per_group, out_per_group = weight.shape[1], len(weight) // groups
    adapted = weight.clone()
    for j, i in enumerate(indices.tolist()):
        group, column = divmod(i, in_per_group)
        rows = slice(group * out_per_group, (group + 1) * out_per_group)
        adapted[rows, column] = (weight[rows, column] + scaling * delta[:, j]).to(weight.dtype)
    return adapted


def paca_conv(
    x: Tensor,
    weight: Tensor,
    delta: Tensor,
    indices: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Apply the adapted convolution, starting from the *pretrained* kernel.

    Args:
        x: (B, I, *positions) or (I, *positions) activations.
        weight: (O, I/G, *k) pretrained kernel.
        delta: (O/G, R, *k) update of the input channels.
        indices: (R,) int64 of the I input channels.
        scaling: alpha / R.
        bias: (O,) bias.
        stride: As F.conv2d takes it, and so are the others.
        padding: Zeros on both sides, or "same" or "valid".
        dilation: Steps between the kernel's taps.
        groups: G.

    Returns:
        (B, O, *positions) or (O, *positions).
    """
    weight = adapted_kernel(weight, delta, indices, scaling, groups)
    convolution = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()]
    return convolution(x, weight, bias, stride, padding, dilation, groups)


def adapted_experts(
    weight: Tensor,
    delta: Tensor,
    indices: Tensor,
    scaling: float,
    *,
    is_transposed: bool = False,
) -> Tensor:
    """Return W' of every expert, all with the same trained columns.

    Args:
        weight: (E, O, I) pretrained weights.
        delta: (E, O, R) update of the columns; differentiable.
        indices: (R,) int64 columns.
        scaling: alpha / R.
        is_transposed: The weights are (E, I, O).

    Returns:
        What `weight` is, in its dtype.
    """
    if is_transposed:
        weight = weight.transpose(1, 2)
        return adapted_experts(weight, delta, indices, scaling).transpose(1, 2)
    pairs = zip(weight, delta, strict=True)
    return torch.stack([adapted_weight(w, d, indices, scaling) for w, d in pairs])


def paca_experts_linear(
    x: Tensor,
    weight: Tensor,
    delta: Tensor,
    indices: Tensor,
    scaling: float,
    offsets: Tensor,
    *,
    is_transposed: bool = False,
) -> Tensor:
    """Apply each expert's adapted linear map to its tokens, from the *pretrained* weights.

    Args:
        x: (S, I) activations of the routed tokens, sorted by expert.
        weight: (E, O, I) pretrained weights.
        delta: (E, O, R) update of the columns.
        indices: (R,) int64 columns.
        scaling: alpha / R.
        offsets: (E,) where each expert's tokens end; the last one is S.
        is_transposed: The weights are (E, I, O).

    Returns:
        (S, O) activations.
    """
    adapted = adapted_experts(weight, delta, indices, scaling, is_transposed=is_transposed)
    sizes = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    maps = adapted.transpose(1, 2) if is_transposed else adapted
    return torch.cat([F.linear(part, w) for part, w in zip(x.split(sizes), maps, strict=True)])
