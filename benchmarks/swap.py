"""The rival way to train columns in place: swap them in and out around every matmul.

An emulation of the PaCA layer that comes with PEFT 0.22, written from a description of what it
does, so that the two ways can be compared inside one PEFT release and one run:

    forward   read the r original columns, add scaling * delta, write the sum into the weight, one
              F.linear, write the originals back
    backward  write the adapted columns, one GEMM for dx, write the originals back
    kept      x[..., indices], originals (O, r), adapted columns (O, r), per call

The weight is the pretrained one between any two calls, at the price of four writes of columns per
layer and micro-batch. `pacatune.residency` writes once per optimizer step.
"""

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.nn import functional as F

from pacatune.tuner.layer import PacaLayer


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        delta: Tensor,
        indices: Tensor,
        scaling: float,
        bias: Tensor | None,
    ) -> Tensor:
        # `.data` has a version counter of its own: autograd does not see the writes.
        memory = weight.data
        originals = memory.index_select(1, indices)
        adapted = (originals + scaling * delta).to(memory.dtype)
        memory.index_copy_(1, indices, adapted)
        y = F.linear(x, weight, bias)
        memory.index_copy_(1, indices, originals)
        ctx.scaling = scaling
        ctx.save_for_backward(
            x.index_select(-1, indices), weight, delta, indices, originals, adapted
        )
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, _, needs_delta, *_ = ctx.needs_input_grad
        x_R, weight, delta, indices, originals, adapted = ctx.saved_tensors
        gx = gdelta = None
        if needs_x:
            memory = weight.data
            memory.index_copy_(1, indices, adapted)
            gx = gy.matmul(weight)
            memory.index_copy_(1, indices, originals)
        if needs_delta:
            gy_NO, x_NR = gy.reshape(-1, gy.shape[-1]), x_R.reshape(-1, x_R.shape[-1])
            gdelta = gy_NO.t().mm(x_NR).to(delta.dtype).mul_(ctx.scaling)
        return gx, None, gdelta, None, None, None


class SwapLinear(nn.Module):
    """A linear layer whose adapted columns are in its weight during its own matmuls only.

    Args:
        layer: One of ours, freshly made; its columns and its delta are taken over.
    """

    def __init__(self, layer: PacaLayer) -> None:
        super().__init__()
        self.base_layer = layer.unload_and_optionally_merge_module(
            merge=False, safe_merge=False, adapter_names=None
        )
        # By adapter name and looked up in each call, as in every PEFT layer.
        self.active_adapters = list(layer.active_adapters)
        self.paca_delta = nn.ParameterDict(
            {name: layer.paca_delta[name].weight for name in self.active_adapters}
        )
        self.paca_indices = BufferDict(
            {name: layer.paca_indices[name] for name in self.active_adapters}, persistent=True
        )
        self.scaling = dict(layer.scaling)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., I) -> (..., O)."""
        (name,) = self.active_adapters
        base = self.base_layer
        delta, indices = self.paca_delta[name], self.paca_indices[name]
        return _Swap.apply(x, base.weight, delta, indices, self.scaling[name], base.bias)


def swap_layers(model: nn.Module) -> None:
    """Replace each of our layers in `model` by a `SwapLinear` with the same columns."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, PacaLayer)]
    for name, layer in layers:
        model.set_submodule(name, SwapLinear(layer))
