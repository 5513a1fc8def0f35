"""Compares methods on one task: `pacatune compare`. Parts are lazy."""

from typing import TYPE_CHECKING

from pacatune.lazy import import_later

if TYPE_CHECKING:
    from pacatune.study.config import Arm, StudyConfig
    from pacatune.study.result import ArmResult, StudyResult
    from pacatune.study.runner import StudyPaused, run_study
    from pacatune.study.statistics import Comparison

__all__ = [
    "Arm",
    "ArmResult",
    "Comparison",
    "StudyConfig",
    "StudyPaused",
    "StudyResult",
    "run_study",
]

__getattr__, __dir__ = import_later(
    __name__, __all__, (".config", ".result", ".statistics", ".runner")
)
