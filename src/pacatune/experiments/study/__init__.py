"""Compares methods on one task: `pacatune compare`."""

from pacatune.experiments.study.config import Arm, StudyConfig
from pacatune.experiments.study.result import ArmResult, Comparison, RunRecord, StudyResult
from pacatune.experiments.study.runner import run_study

__all__ = [
    "Arm",
    "ArmResult",
    "Comparison",
    "RunRecord",
    "StudyConfig",
    "StudyResult",
    "run_study",
]
