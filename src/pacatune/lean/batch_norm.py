"""BatchNorm that keeps nothing for backward while it is frozen and in evaluation mode.

There it is a scale and a shift per channel,

    y = scale * x + shift      scale = weight / sqrt(running_var + eps)
    dx = scale * dy

torch keeps x all the same, which the gradient of `weight` alone would read. In a CNN these are the
outputs of all convolutions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pacatune.lean.modules import LeanModule
from pacatune.ops.columns import widened
from pacatune.ops.tracing import is_traced

_TIMMS = "timm.layers.norm_act", "BatchNormAct2d"


class _FrozenBatchNorm(torch.autograd.Function):
    """BatchNorm in evaluation mode, with frozen weight and bias.

    Forward   F.batch_norm(x, ..., training=False), bit for bit
    Backward  dx = dy * weight / sqrt(running_var + eps)
    Saves references to `running_var` and `weight`; F.batch_norm saves x as well.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(running_var, weight)
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        running_var, weight = ctx.saved_tensors
        # In float32 at least, as torch does; only the product is rounded.
        scale = torch.rsqrt(widened(running_var) + ctx.eps)
        if weight is not None:
            scale = scale * weight
        gx = (gy * scale.view(-1, *[1] * (gy.dim() - 2))).to(gy.dtype)
        return gx, None, None, None, None, None


class LeanBatchNorm(LeanModule):
    """torch's BatchNorm, or timm's with an activation, keeping nothing where that is possible.

    While the layer trains, or normalises by the batch, it does what it did before.
    """

    settings: bool
    """Whether it has an activation."""

    def forward(self, x: Tensor) -> Any:
        """Normalise (B, C, *positions)."""
        layer: Any = self
        is_evaluating = not layer.training and layer.running_mean is not None
        if not (is_evaluating and torch.is_grad_enabled() and is_frozen(layer)) or is_traced():
            return super().forward(x)
        layer._check_input_dim(x)
        y = _FrozenBatchNorm.apply(
            x, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps
        )
        return layer.act(layer.drop(y)) if self.settings else y


def is_frozen(layer: nn.Module) -> bool:
    """Whether the layer's own parameters ask for no gradient."""
    return not any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


def find_batch_norm(layer: nn.Module) -> bool | None:
    """Whether a BatchNorm has an activation; None if it is none of torch's or timm's."""
    kind: Any = type(layer)
    if isinstance(layer, LeanBatchNorm):
        return layer.settings
    if "forward" in vars(layer):
        return None
    if isinstance(layer, _BatchNorm) and kind.forward is _BatchNorm.forward:
        return False
    return True if (kind.__module__, kind.__name__) == _TIMMS else None
