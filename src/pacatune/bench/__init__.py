"""Measure training steps on the machine at hand: time, operations, memory, limits."""

from pacatune.bench.config import BenchConfig, Setting
from pacatune.bench.methods import METHODS
from pacatune.bench.running import run
from pacatune.bench.shape import llama_values, load_values, parse_shape

__all__ = [
    "METHODS",
    "BenchConfig",
    "Setting",
    "llama_values",
    "load_values",
    "parse_shape",
    "run",
]
