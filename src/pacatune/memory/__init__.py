"""Memory of training: measured."""

from pacatune.memory.measure import SavedBytes, peak_process_bytes, reset_peak_process_bytes

__all__ = ["SavedBytes", "peak_process_bytes", "reset_peak_process_bytes"]
