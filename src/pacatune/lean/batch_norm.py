"""BatchNorm that keeps nothing for backward while it is frozen and in evaluation mode.

There it is a scale and a shift per channel,

    y = scale * x + shift      scale = weight / sqrt(running_var + eps)
    dx = scale * dy

torch keeps x all the same, which the gradient of `weight` alone would read. In a CNN these are the
outputs of all convolutions.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "disable_batch_norm",
    "enable_batch_norm",
    "find_batch_norm",
    "frozen_batch_norm",
]

_TIMM = "timm.layers.norm_act"


def frozen_batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Apply BatchNorm in evaluation mode, with frozen weight and bias.

    Forward   F.batch_norm(x, ..., training=False), bit for bit
    Backward  dx = dy * weight / sqrt(running_var + eps)
    Saves references to `running_var` and `weight`; F.batch_norm saves x as well.

    Args:
        x: (B, C, *positions) or (B, C) activations.
        running_mean: (C,) statistics.
        running_var: (C,) statistics.
        weight: (C,) frozen; None is ones.
        bias: (C,) frozen; None is zeros.
        eps: Added to the variance.

    Raises:
        ValueError: If `weight` or `bias` asks for a gradient.
    """
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.requires_grad:
            raise ValueError(
                f"`{name}` asks for a gradient, but is frozen here; use F.batch_norm instead."
            )
    y: Tensor = _FrozenBatchNorm.apply(x, running_mean, running_var, weight, bias, eps)
    return y


class _FrozenBatchNorm(torch.autograd.Function):
    """`frozen_batch_norm`, unchecked."""

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
        wide = torch.promote_types(running_var.dtype, torch.float32)
        scale = torch.rsqrt(running_var.to(wide) + ctx.eps)
        if weight is not None:
            scale = scale * weight
        gx = (gy * scale.view(-1, *[1] * (gy.dim() - 2))).to(gy.dtype)
        return gx, None, None, None, None, None


def find_batch_norm(model: nn.Module) -> list[str]:
    """Return the names of the layers that keep nothing with `enable_batch_norm`, on or not.

    Their weights are frozen. Whether they will be in evaluation mode is not known here.
    """
    return [
        name
        for name, layer in model.named_modules()
        if (_is_lean(layer) or _lean_forward(layer) is not None) and _is_frozen(layer)
    ]


def enable_batch_norm(model: nn.Module) -> list[str]:
    """Let the BatchNorm layers of a model keep nothing whenever they are frozen and evaluate.

    While a layer trains, or normalises by the batch, it does what it did before; so this never
    changes a result. torch's classes and timm's with an activation are known; others are left
    alone.

    Returns:
        The names of the layers.
    """
    names = []
    for name, layer in model.named_modules():
        forward = _lean_forward(layer)
        if forward is not None:
            # Copies of the layer get their own, and those that were pickled have the class's.
            layer.forward = types.MethodType(forward, layer)
            names.append(name)
    return names


def disable_batch_norm(model: nn.Module) -> None:
    """Undo `enable_batch_norm`."""
    for layer in model.modules():
        if _is_lean(layer):
            del layer.forward


def _is_lean(layer: nn.Module) -> bool:
    return getattr(layer.__dict__.get("forward"), "__func__", None) in _LEAN_FORWARDS


def _is_frozen(layer: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


def _lean_forward(layer: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    """Return the lean forward of a layer's class, None where there is none."""
    kind: Any = type(layer)
    own = layer.__dict__.get("forward")
    if own is not None and getattr(own, "__func__", None) is not kind.forward:
        return None  # somebody's, or ours already
    if isinstance(layer, _BatchNorm) and kind.forward is _BatchNorm.forward:
        return _forward
    is_timms = kind.__name__ == "BatchNormAct2d" and kind.__module__ == _TIMM
    return _forward_with_activation if is_timms else None


def _normalise(layer: Any, x: Tensor) -> Tensor | None:
    """Return what the layer normalises x to, None where it is not frozen or not evaluating."""
    if layer.training or layer.running_mean is None or not torch.is_grad_enabled():
        return None
    if not _is_frozen(layer):
        return None
    layer._check_input_dim(x)
    y: Tensor = _FrozenBatchNorm.apply(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps
    )
    return y


def _forward(layer: Any, x: Tensor) -> Any:
    y = _normalise(layer, x)
    return type(layer).forward(layer, x) if y is None else y


def _forward_with_activation(layer: Any, x: Tensor) -> Any:
    y = _normalise(layer, x)
    return type(layer).forward(layer, x) if y is None else layer.act(layer.drop(y))


# By that name a pickled method is found again: the one of the class.
_forward.__name__ = _forward_with_activation.__name__ = "forward"
_LEAN_FORWARDS = (_forward, _forward_with_activation)
