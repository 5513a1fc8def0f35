"""QPaCA: an adapted linear layer whose base weight is kept in few bits.

Training dequantises the weight in each pass, which is what the base layer's own forward does as
well, so the adapted columns cost one small write and no GEMM; x[..., indices] is all that is kept
for backward. Everything that the base layer must do itself (inference by its own kernels, hooks,
weights that cannot be dequantised) takes the additive form of `linear.py`.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from pacatune.ops.quantized import paca_quantized_linear
from pacatune.tuner.linear import Linear

__all__ = ["QuantizedLinear"]


class QuantizedLinear(Linear):
    """An adapted linear layer of bitsandbytes, torchao, HQQ or another of PEFT's backends."""

    def _attach(self) -> None:
        pass  # a weight of few bits is never written

    def _fast_forward(self, x: Tensor) -> Tensor | None:
        update = self._single_update()
        backend, base_layer = self.quantization_backend, cast(Any, self.base_layer)
        if update is None or not torch.is_grad_enabled() or not backend.supports_merge:
            return None
        dtype, multiply = getattr(base_layer, "compute_dtype", None) or x.dtype, None
        if backend.backend_name == "bnb 8bit":
            # Its kernel rounds x to 8 bits too; alone, it would keep all of x for backward.
            dtype, multiply = x.dtype, base_layer.forward
        bias = base_layer.bias
        if bias is not None and multiply is None:
            bias = bias.to(dtype)
        dequantize = partial(dequantized, backend, base_layer)
        result = paca_quantized_linear(x.to(dtype), *update, dequantize, bias, multiply)
        return result.to(x.dtype)


def dequantized(backend: Any, base_layer: Any, dtype: torch.dtype) -> Tensor:
    """Return the (O, I) weight of a quantised layer as a new tensor.

    Args:
        backend: PEFT's, which knows how.
        base_layer: The quantised layer.
        dtype: Of the result.
    """
    weight: Tensor
    if backend.backend_name == "bnb 4bit":
        from bitsandbytes.functional import dequantize_4bit

        # A parameter that FSDP has gathered has lost its state; the module keeps it.
        state = getattr(base_layer.weight, "quant_state", None) or base_layer.quant_state
        weight = dequantize_4bit(base_layer.weight.data, state)
    else:
        weight = backend.get_base_weight(base_layer)
    return weight.to(dtype)
