"""Activations that are not kept, exactly: see `enable`."""

from pacatune.lean.attention import attend
from pacatune.lean.enable import LeanReport, disable, enable
from pacatune.lean.gated import ACTIVATIONS, gated_product
from pacatune.lean.loss import linear_cross_entropy
from pacatune.lean.norm import layer_norm, rms_norm

__all__ = [
    "ACTIVATIONS",
    "LeanReport",
    "attend",
    "disable",
    "enable",
    "gated_product",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
]
