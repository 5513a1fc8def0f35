"""The folder of a run."""

from pathlib import Path

from pacatune.files.result_folder import ResultFolder

__all__ = ["PICTURES", "REPORT_NAME", "RESULT_NAME", "result_folder"]

RESULT_NAME, REPORT_NAME = "bench.json", "bench.md"
PICTURES = ("operations.png", "times.png", "memory.png", "throughput.png", "lengths.png")


def result_folder(path: Path) -> ResultFolder:
    """Return the folder of a benchmark's results."""
    return ResultFolder(
        path=path, mark=RESULT_NAME, kind="a benchmark", others=(REPORT_NAME, *PICTURES)
    )
