"""Compares methods on one task: `pacatune compare`."""

from pacatune.study.config import Arm, StudyConfig
from pacatune.study.result import ArmResult, Comparison, RunRecord, StudyResult
from pacatune.study.runner import run_study

__all__ = [
    "Arm",
    "ArmResult",
    "Comparison",
    "RunRecord",
    "StudyConfig",
    "StudyResult",
    "run_study",
]
