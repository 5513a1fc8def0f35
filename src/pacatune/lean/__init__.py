"""Activations that are not kept, exactly: see `enable`."""

from pacatune.lean.enable import LeanReport, disable, enable

__all__ = ["LeanReport", "disable", "enable"]
