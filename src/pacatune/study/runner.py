"""Runs a study: every run once, whatever interrupts it."""

from pathlib import Path

from rich.console import Console

from pacatune.study.config import StudyConfig
from pacatune.study.result import StudyResult


def run_study(config: StudyConfig, folder: Path, *, console: Console | None = None) -> StudyResult:
    """Run what the folder does not hold yet, and report on everything.

    Args:
        config: The study.
        folder: Gets runs/ with one file for each run, study.json, report.md and plots; one that
            holds runs of this or an earlier study is continued.
        console: Where to show progress; standard output when None.

    Raises:
        ValueError: If the configuration cannot be used.
        FileExistsError: If the folder holds something else.
        KeyboardInterrupt: If a signal stopped it; finished runs are kept.
    """
    raise NotImplementedError
