"""MT-Bench: a model answers 80 questions of two turns, another model grades the answers."""

from typing import TYPE_CHECKING

from pacatune.evaluation.mt_bench.config import MtBenchConfig
from pacatune.lazy import import_later

if TYPE_CHECKING:
    from pacatune.evaluation.mt_bench.run import run_mt_bench

__all__ = ["MtBenchConfig", "run_mt_bench"]

# It needs torch, which its options do not.
__getattr__, __dir__ = import_later(__name__, __all__, (".run",))
