"""Marks of a model folder whose files are being edited in place; see `pacatune.patch.folder`."""

from pathlib import Path

JOURNAL_NAME = ".pacatune-patch-journal"
"""What is being written and what was there before, until all of it is written."""
PARKED_SUFFIX = ".patching"
"""Ends the name of a file that is being edited, so that no loader takes it for the model's."""


def refuse_half_edited(folder: Path) -> None:
    """Refuse a folder that is being edited, or whose editing was interrupted."""
    if (folder / JOURNAL_NAME).exists():
        raise ValueError(
            f"{folder} is being patched in place, or that was interrupted and it is neither the "
            f"base nor the patched model; `pacatune patch recover --model {folder}` rolls it back."
        )


def file_path(folder: Path, name: str) -> Path:
    """Return where a file of the model is: under its name, or under the one while it is edited."""
    parked = folder / f"{name}{PARKED_SUFFIX}"
    return parked if parked.exists() else folder / name
