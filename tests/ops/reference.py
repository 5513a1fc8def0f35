"""The equations of PaCA in plain autograd: slow, obvious, and the oracle of every test.

Nothing here is fast or lean: the adapted weight is built as a new tensor in every call, so autograd
sees an ordinary layer whose weight depends on `delta`. Shapes and names are those of pacatune.ops,
but that `weight` is the pretrained one everywhere.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def adapted_weight(weight: Tensor, delta: Tensor, indices: Tensor, scaling: float) -> Tensor:
    """Return W' = W with W'[:, indices] = W[:, indices] + scaling * delta (Eq. 7), (O, I).

    In the dtype of W: the sum is formed in the wider of the two dtypes and rounded once.
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
    """Apply the adapted linear map to (..., I) (Eqs. 7-9 by autograd)."""
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
    """Return W', (O, I/G, *k): input channel i leads to the outputs of its own group only."""
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
    """Apply the adapted convolution to (B, I, *positions) or (I, *positions)."""
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
    """Return W' of every expert, (E, O, I) or (E, I, O), all with the same trained columns."""
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
    """Apply each expert's adapted linear map to its tokens: (S, I), sorted by expert, to (S, O)."""
    adapted = adapted_experts(weight, delta, indices, scaling, is_transposed=is_transposed)
    sizes = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    maps = adapted.transpose(1, 2) if is_transposed else adapted
    return torch.cat([F.linear(part, w) for part, w in zip(x.split(sizes), maps, strict=True)])
