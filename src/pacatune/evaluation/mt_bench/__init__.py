"""MT-Bench: a model answers 80 questions of two turns, another model grades the answers."""

from pacatune.evaluation.mt_bench.config import MtBenchConfig
from pacatune.evaluation.mt_bench.run import run_mt_bench

__all__ = ["MtBenchConfig", "run_mt_bench"]
