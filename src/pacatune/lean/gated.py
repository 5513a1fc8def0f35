"""The product of a gated MLP, act(gate) * up, from which backward needs the two factors only.

Per token and I channels, plain autograd keeps gate (for the activation), act(gate) and up (for the
product): 3 I elements. Here: gate and up, 2 I; act(gate) is computed again. What the following
linear layer keeps of the product is its own matter: all of it under LoRA, R columns under PaCA.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pacatune.lean.fused import fused
from pacatune.ops.tracing import NOT_LEAN, refuse_second_derivative

# The activations of gated MLPs and the products they gate, with the module's own rounding.


_aten = torch.ops.aten
_QUICK = 1.702


@dataclass(frozen=True)
class Activation:
    """An elementwise function, and what it does to a gradient.

    Attributes:
        name: As in transformers' configurations.
        value: x -> act(x), both (..., I).
        gradient: (gradient of act(x), x) -> gradient of x.
        overwrites: Whether nobody needs the factors after their gradients, which then take the
            memory of `up` and `gh`: of the widest tensors of a layer, three live at once, not five.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    overwrites: bool = False

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return act(gate) * up; all (..., I)."""
        return _product(gate, up, self)

    def product_columns(self, gate: Tensor, up: Tensor, indices: Tensor) -> Tensor:
        """Return the columns `indices` (R,) of act(gate) * up, (..., R)."""
        return _product_columns(gate, up, indices, self)

    def product_gradients(self, gh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of gate and up, (..., I) each, from that of act(gate) * up."""
        return self.owned_product_gradients(gh.clone() if self.overwrites else gh, gate, up)

    def owned_product_gradients(
        self, gh: Tensor, gate: Tensor, up: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the same from a gradient that nobody else needs."""
        if not self.overwrites or not gh.dtype == gate.dtype == up.dtype or not gh.numel():
            return _product_gradients(gh, gate, up, self)
        # Whole vectors of a processor, whose remainders are computed in another way.
        size = max(1, _MAX_CHUNK // gh.shape[-1] // 64) * 64
        gh = gh.contiguous()
        # Views, and an error where there is none: a copy of `up` would be overwritten in vain.
        rows = [x.view(-1, x.shape[-1]).split(size) for x in (gh, gate, up)]
        for gh_rows, gate_rows, up_rows in zip(*rows, strict=True):
            _overwrite(gh_rows, gate_rows, up_rows, self)
        return up, gh


@functools.cache
def overwriting(activation: Activation) -> Activation:
    """Return an activation as one that overwrites."""
    return replace(activation, overwrites=True)


_MAX_CHUNK = 2**24  # elements: of what is made on the way, this many at a time


@fused
def _overwrite(gh: Tensor, gate: Tensor, up: Tensor, activation: Activation) -> None:
    ggate = activation.gradient(gh * up, gate)
    gh.mul_(activation.value(gate))
    up.copy_(ggate)


@fused
def _product(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    return _times(activation.value(gate), up)


@fused
def _product_gradients(
    gh: Tensor, gate: Tensor, up: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    ggate = activation.gradient(gh * up, gate)
    return ggate, _times(activation.value(gate), gh)


@fused
def _product_columns(gate: Tensor, up: Tensor, indices: Tensor, activation: Activation) -> Tensor:
    gate_R, up_R = (x.index_select(-1, indices) for x in (gate, up))
    return _times(activation.value(gate_R), up_R)


def _times(x: Tensor, other: Tensor) -> Tensor:
    """Multiply in place where the dtypes allow it."""
    return x.mul_(other) if x.dtype == other.dtype else x * other


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return _aten.gelu_backward(grad, x, approximate="tanh")


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
"""Name -> activation of a gated MLP that is known."""


class _GatedProduct(torch.autograd.Function):
    """Multiply an activated gate with the up projection, (..., I) both.

    Forward   h = act(gate) * up
    Backward  d(up) = dh * act(gate)       d(gate) = act'(gate) (dh * up)
    Saves gate and up; computes act(gate) twice.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return activation.product(gate, up)

    @staticmethod
    def backward(ctx: Any, gh: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("A lean gated MLP", NOT_LEAN)
        gate, up = ctx.saved_tensors
        return *ctx.activation.product_gradients(gh, gate, up), None


def apply_gated_product(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Return act(gate) * up, keeping the two."""
    return _GatedProduct.apply(gate, up, activation)
