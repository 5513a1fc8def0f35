"""`bfloat16_is_fast` by the name it had; it is in `pacatune.precision`."""

from pacatune.precision import bfloat16_is_fast

__all__ = ["bfloat16_is_fast"]
