"""The equations of PaCA in plain autograd: slow, obvious, and the oracle of every test.

Nothing here is fast or lean: the adapted weight is built as a new tensor in every call, so autograd
sees an ordinary linear layer whose weight depends on `delta`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["adapted_weight", "paca_linear"]


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
