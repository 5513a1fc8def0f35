"""Activations that are not kept, exactly: see `enable`."""

from pacatune.lean.activation import ACTIVATIONS
from pacatune.lean.attention import attend
from pacatune.lean.cross_entropy import linear_cross_entropy
from pacatune.lean.enable import LeanReport, disable, enable
from pacatune.lean.gated import gated_product
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
