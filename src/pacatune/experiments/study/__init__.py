"""Compares methods on one task: `pacatune compare`."""

from pacatune.experiments.study.config import Arm, StudyConfig
from pacatune.experiments.study.result import ArmResult, RunRecord, StudyResult
from pacatune.experiments.study.runner import StudyPaused, run_study
from pacatune.experiments.study.statistics import Comparison

__all__ = [
    "Arm",
    "ArmResult",
    "Comparison",
    "RunRecord",
    "StudyConfig",
    "StudyPaused",
    "StudyResult",
    "run_study",
]
