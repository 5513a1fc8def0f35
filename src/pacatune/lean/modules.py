"""What lean modules do in place of their own forward; each goes back to it where it must.

That is: without gradients, in graphs of torch.compile (which decide themselves what to keep) and
under transforms of torch.func.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pacatune.lean.activation import Activation
from pacatune.lean.gated import apply_gated_product
from pacatune.lean.logits import LazyLogits
from pacatune.lean.norm import Norm, apply_norm
from pacatune.lean.swap import LeanModule
from pacatune.ops.tracing import is_traced

__all__ = ["GatedNames", "LeanAttention", "LeanGatedMLP", "LeanHead", "LeanModel", "LeanNorm"]


@dataclass(frozen=True)
class GatedNames:
    """What a gated MLP calls its parts.

    Attributes:
        gate: Projection to the gate; with `is_fused`, to both halves.
        up: The other projection.
        down: Projection of the product.
        activation: Of the gate.
        is_fused: Whether one layer computes gate and up.
        gate_first: Which half is the gate.
    """

    gate: str
    up: str
    down: str
    activation: Activation
    is_fused: bool = False
    gate_first: bool = True


class LeanGatedMLP(LeanModule):
    """down(act(gate(x)) * up(x)), keeping gate and up."""

    settings: GatedNames

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Apply the MLP to (..., H)."""
        if args or kwargs or not torch.is_grad_enabled() or is_traced():
            return super().forward(x, *args, **kwargs)
        names, parts = self.settings, self._modules
        gate = parts[names.gate](x)  # type: ignore[misc]
        if names.is_fused:
            first, second = gate.chunk(2, dim=-1)
            gate, up = (first, second) if names.gate_first else (second, first)
        else:
            up = parts[names.up](x)  # type: ignore[misc]
        down: Any = parts[names.down]
        if not (gate.requires_grad or up.requires_grad):
            return down(names.activation.value(gate) * up)
        # A layer that needs only some columns of the product can do without the product.
        together = getattr(down, "forward_of_product", None)
        y = None if together is None else together(gate, up, names.activation)
        return down(apply_gated_product(gate, up, names.activation)) if y is None else y


class LeanNorm(LeanModule):
    """RMSNorm or LayerNorm, keeping its input as it came."""

    settings: Norm

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Normalise (..., I)."""
        weight = self._parameters.get("weight")
        if (
            args
            or kwargs
            or not torch.is_grad_enabled()
            or is_traced()
            or x.itemsize > 4
            or (weight is not None and weight.dtype != x.dtype and not self.settings.mixes)
        ):
            return super().forward(x, *args, **kwargs)
        return apply_norm(x, weight, self._parameters.get("bias"), self.settings)


class LeanAttention(LeanModule):
    """Marks an attention whose calls of the attention function keep no repeated heads."""


_wants_loss: ContextVar[bool] = ContextVar("wants_loss", default=False)


class LeanModel(LeanModule):
    """A model whose loss is computed from its head's `LazyLogits`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; tell its head if there are labels."""
        if is_traced() or kwargs.get("labels") is None or not self.training or _has_own_loss(self):
            return super().forward(*args, **kwargs)
        with _loss_wanted():
            return super().forward(*args, **kwargs)


def _has_own_loss(model: nn.Module) -> bool:
    """Whether somebody gave the model a loss function, which may want a tensor."""
    function = vars(model).get("_loss_function")
    return function is not None and not str(function.__module__).startswith("transformers.")


@contextmanager
def _loss_wanted() -> Iterator[None]:
    token = _wants_loss.set(True)
    try:
        yield
    finally:
        _wants_loss.reset(token)


class LeanHead(LeanModule):
    """An nn.Linear that leaves its product to the loss, where the model computes one."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Any:
        """Return logits (..., V), or what stands for them."""
        weight = self.weight
        if (
            is_traced()
            or not _wants_loss.get()
            or not torch.is_grad_enabled()
            or not (x.requires_grad or weight.requires_grad)
            or x.dim() < 2
            # The weight may be there during the call only: sharded, offloaded.
            or self._forward_hooks
            or self._forward_pre_hooks
            or type(weight) not in (nn.Parameter, Tensor)
        ):
            return super().forward(x)
        return LazyLogits(x, weight, self.bias)
