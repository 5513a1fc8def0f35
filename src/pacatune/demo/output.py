"""The demo's folder: only ever its own."""

import json
from pathlib import Path
from typing import Any

RESULT_NAME = "demo.json"


def open_output(folder: Path) -> None:
    """Make the folder ready, marked as the demo's, so that the next demo may reuse it.

    Raises:
        FileExistsError: If it is a file or holds something without the mark.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output {folder} is a file; choose another: --output DIR.")
    if folder.exists() and any(folder.iterdir()) and not (folder / RESULT_NAME).is_file():
        raise FileExistsError(
            f"output folder {folder} holds files but no {RESULT_NAME}, so they are not from a demo "
            "and stay as they are; choose another: --output DIR."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_result(folder, {"finished": False})


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write demo.json, which is also the folder's mark."""
    text = json.dumps(result, indent=2, ensure_ascii=False)
    (folder / RESULT_NAME).write_text(text + "\n", encoding="utf-8")
