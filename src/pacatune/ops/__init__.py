"""The hand-written gradients of PaCA; torch only."""

from pacatune.ops.columns import Update
from pacatune.ops.convolution import paca_conv
from pacatune.ops.experts import experts_linear, paca_experts_linear, paca_experts_update
from pacatune.ops.linear import paca_linear, paca_linear_additive
from pacatune.ops.quantized import paca_quantized_linear

__all__ = [
    "Update",
    "experts_linear",
    "paca_conv",
    "paca_experts_linear",
    "paca_experts_update",
    "paca_linear",
    "paca_linear_additive",
    "paca_quantized_linear",
]
