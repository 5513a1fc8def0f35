"""Sizes of the small scale: what two cores do in a quarter of an hour, and why it is smaller."""

from typing import Any

from pacatune.measure.models import llama_values

__all__ = ["SHAPE", "SWEEP_LIMIT_BYTES", "SWEEP_SHAPE", "small_dtype", "values_of"]

# Hidden size and layers of the Llama whose steps are timed.
SHAPE = (512, 8)
# Of sweeps until memory ends, which take dozens of processes; and where it ends.
SWEEP_SHAPE = (256, 4)
SWEEP_LIMIT_BYTES = 3 * 2**29


def values_of(shape: tuple[int, int]) -> tuple[dict[str, Any], str]:
    """Return the configuration and the name of a small Llama."""
    hidden_size, num_layers = shape
    return llama_values(hidden_size, num_layers), f"Llama {hidden_size}x{num_layers}"


def small_dtype() -> str:
    """Return the type of weights that this processor multiplies fast."""
    from pacatune.training.precision import bfloat16_is_fast

    return "bfloat16" if bfloat16_is_fast(use_cpu=True) else "float32"
