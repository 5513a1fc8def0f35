"""Adapted columns inside the frozen weight, and nobody who sees them there by mistake."""

from pacatune.residency.weight import Pass, Residency, resident

__all__ = ["Pass", "Residency", "resident"]
