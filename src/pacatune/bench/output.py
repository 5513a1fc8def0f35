"""The folder of a run: only ever its own."""

import json
from pathlib import Path
from typing import Any

__all__ = ["PICTURES", "REPORT_NAME", "RESULT_NAME", "open_output", "write_result"]

RESULT_NAME, REPORT_NAME = "bench.json", "bench.md"
PICTURES = ("operations.png", "times.png", "memory.png", "throughput.png", "lengths.png")


def open_output(folder: Path) -> None:
    """Make the folder ready, marked as a benchmark's, so that the next run may reuse it.

    What an earlier run wrote is removed, nothing else.

    Raises:
        FileExistsError: If it is a file or holds something without the mark.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output {folder} is a file; choose another: --output DIR.")
    if folder.exists() and any(folder.iterdir()) and not (folder / RESULT_NAME).is_file():
        raise FileExistsError(
            f"output folder {folder} holds files but no {RESULT_NAME}, so they are not from a "
            "benchmark and stay as they are; choose another: --output DIR."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / name for name in (REPORT_NAME, *PICTURES)):
        path.unlink(missing_ok=True)
    write_result(folder, {"finished": False})


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write bench.json, which is also the folder's mark."""
    text = json.dumps(result, indent=1, ensure_ascii=False)
    (folder / RESULT_NAME).write_text(text + "\n", encoding="utf-8")
