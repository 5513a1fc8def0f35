"""The activations of gated MLPs and the products they gate, with the module's own rounding."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pacatune.lean.fused import fused

__all__ = ["ACTIVATIONS", "Activation"]

_aten = torch.ops.aten
_QUICK = 1.702


@dataclass(frozen=True)
class Activation:
    """An elementwise function, and what it does to a gradient.

    Attributes:
        name: As in transformers' configurations.
        value: x -> act(x), both (..., I).
        gradient: (gradient of act(x), x) -> gradient of x.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return act(gate) * up; all (..., I)."""
        return _product(gate, up, self)

    def product_gradients(self, gh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of gate and up, (..., I) each, from that of act(gate) * up."""
        return _product_gradients(gh, gate, up, self)


@fused
def _product(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    return _times(activation.value(gate), up)


@fused
def _product_gradients(
    gh: Tensor, gate: Tensor, up: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    ggate = activation.gradient(gh * up, gate)
    return ggate, _times(activation.value(gate), gh)


def _times(x: Tensor, other: Tensor) -> Tensor:
    """Multiply in place where the dtypes allow it."""
    return x.mul_(other) if x.dtype == other.dtype else x * other


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return _aten.gelu_backward(grad, x, approximate="tanh")  # type: ignore[no-any-return]


def _relu2(x: Tensor) -> Tensor:
    return torch.square(F.relu(x))


def _relu2_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return F.relu(x).mul_(2).mul_(grad)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(_QUICK * x)


def _quick_gelu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    gate = torch.sigmoid(_QUICK * x)
    return grad * gate * (1 + _QUICK * x * (1 - gate))


def _new_gelu(x: Tensor) -> Tensor:
    """GELU by tanh, written out: rounds after every step in 16 bits."""
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


# The first that agrees with a module's activation is taken: those that agree in exact arithmetic
# stand in the order of their speed.
ACTIVATIONS = {
    activation.name: activation
    for activation in (
        Activation("silu", F.silu, _aten.silu_backward),
        Activation("gelu", F.gelu, _aten.gelu_backward),
        Activation("gelu_pytorch_tanh", _gelu_tanh, _gelu_tanh_gradient),
        Activation("gelu_new", _new_gelu, _gelu_tanh_gradient),
        Activation("relu2", _relu2, _relu2_gradient),
        Activation("relu", F.relu, lambda grad, x: _aten.threshold_backward(grad, x, 0)),
        Activation("quick_gelu", _quick_gelu, _quick_gelu_gradient),
    )
}
