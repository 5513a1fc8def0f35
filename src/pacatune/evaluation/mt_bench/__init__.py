"""MT-Bench: a model answers 80 questions of two turns, another model grades the answers."""

from typing import TYPE_CHECKING, Any

from pacatune.evaluation.mt_bench.config import MtBenchConfig

if TYPE_CHECKING:
    from pacatune.evaluation.mt_bench.run import run_mt_bench

__all__ = ["MtBenchConfig", "run_mt_bench"]


def __getattr__(name: str) -> Any:
    if name == "run_mt_bench":  # needs torch, which its options do not
        from pacatune.evaluation.mt_bench.run import run_mt_bench

        return run_mt_bench
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
