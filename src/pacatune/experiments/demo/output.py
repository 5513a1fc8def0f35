"""The folder of a demo."""

from pathlib import Path

from pacatune.files.result_folder import ResultFolder


def result_folder(path: Path) -> ResultFolder:
    """Return the folder of a demo's results; its runs replace their own folders in it."""
    return ResultFolder(path=path, mark="demo.json", kind="a demo")
