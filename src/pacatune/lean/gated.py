"""The product of a gated MLP, act(gate) * up, from which backward needs the two factors only.

Per token and I channels, plain autograd keeps gate (for the activation), act(gate) and up (for the
product): 3 I elements. Here: gate and up, 2 I; act(gate) is computed again. What the following
linear layer keeps of the product is its own matter: all of it under LoRA, R columns under PaCA.
"""

from typing import Any

import torch
from torch import Tensor

from pacatune.lean.activation import ACTIVATIONS, Activation
from pacatune.lean.tracing import refuse_second_derivative

__all__ = ["apply_gated_product", "gated_product"]


def gated_product(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """Multiply an activated gate with the up projection.

    Forward   h = act(gate) * up
    Backward  d(up) = dh * act(gate)       d(gate) = act'(gate) (dh * up)
    Saves gate and up; computes act(gate) twice.

    Args:
        gate: (..., I) before the activation.
        up: (..., I).
        activation: One of `pacatune.lean.ACTIVATIONS`.

    Returns:
        (..., I).

    Raises:
        ValueError: If `activation` is unknown or the shapes differ.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"`activation` ({activation!r}) must be one of {sorted(ACTIVATIONS)}.")
    if gate.shape != up.shape:
        raise ValueError(
            f"`gate` and `up` must have one shape, got {tuple(gate.shape)} and {tuple(up.shape)}."
        )
    return apply_gated_product(gate, up, ACTIVATIONS[activation])


class _GatedProduct(torch.autograd.Function):
    """See `gated_product`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return activation.product(gate, up)

    @staticmethod
    def backward(ctx: Any, gh: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("gated_product")
        gate, up = ctx.saved_tensors
        return *ctx.activation.product_gradients(gh, gate, up), None


def apply_gated_product(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Apply `gated_product` without its checks."""
    return _GatedProduct.apply(gate, up, activation)  # type: ignore[no-any-return]
