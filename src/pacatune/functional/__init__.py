"""The hand-written gradients of PaCA; torch only. `pacatune.reference` has the same in autograd."""

from pacatune.functional.convolution import paca_conv
from pacatune.functional.experts import experts_linear, paca_experts_linear, paca_experts_update
from pacatune.functional.linear import paca_linear, paca_linear_additive
from pacatune.functional.quantized import paca_quantized_linear

__all__ = [
    "experts_linear",
    "paca_conv",
    "paca_experts_linear",
    "paca_experts_update",
    "paca_linear",
    "paca_linear_additive",
    "paca_quantized_linear",
]
