"""Adapted columns inside the frozen weight, and nobody who sees them there by mistake."""

from pacatune.residency.gathered import GatheredResidency
from pacatune.residency.passes import Pass, resident
from pacatune.residency.weight import Residency

__all__ = ["GatheredResidency", "Pass", "Residency", "resident"]
