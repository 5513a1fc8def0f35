"""The hand-written gradients of PaCA; torch only. `pacatune.reference` has the same in autograd."""

from pacatune.functional.linear import paca_linear, paca_linear_additive

__all__ = ["paca_linear", "paca_linear_additive"]
