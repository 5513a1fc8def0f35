"""Marks of a model folder whose files are being edited in place; see `pacatune.patch.folder`."""

from pathlib import Path

JOURNAL_NAME = ".pacatune-patch-journal"
"""What is being written and what was there before, until all of it is written."""
PARKED_SUFFIX = ".patching"
"""Ends the name of a file that is being edited, so that no loader takes it for the model's."""


def is_gguf(model: str | Path) -> bool:
    """Whether a model is one file of llama.cpp, by its ending; others are folders."""
    return Path(model).suffix.lower() == ".gguf"


def folder_of(model: Path) -> Path:
    """Return the folder of a model: itself, or the one that its file lies in."""
    return model.parent if is_gguf(model) else model


def journal_of(model: Path) -> Path:
    """Return where the journal of a model is: in its folder, or beside its file."""
    named = model.with_name(f".{model.name}{JOURNAL_NAME}")
    return named if is_gguf(model) else model / JOURNAL_NAME


def refuse_half_edited(model: Path) -> None:
    """Refuse a model that is being edited, or whose editing was interrupted."""
    if journal_of(model).exists():
        raise ValueError(
            f"{model} is being patched in place, or that was interrupted and it is neither the "
            f"base nor the patched model; `pacatune patch recover --model {model}` rolls it back."
        )


def file_path(folder: Path, name: str) -> Path:
    """Return where a file of the model is: under its name, or under the one while it is edited."""
    parked = folder / f"{name}{PARKED_SUFFIX}"
    return parked if parked.exists() else folder / name
