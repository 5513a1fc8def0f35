"""Where models and data that were fetched once are kept."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pacatune.files.folder import staged_folder

_SOURCE_FILE = "source.json"
_WEIGHTS_FILE = "model.safetensors"


def default_cache() -> Path:
    """Return the user's cache folder for pacatune; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pacatune"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare_folder(
    folder: Path,
    num_bytes: int,
    make: Callable[[Path], dict[str, Any]],
    say: Callable[[str], None],
) -> Path:
    """Return a folder that is made the first time, or again if its weights have changed.

    Args:
        folder: Whole or absent afterwards.
        num_bytes: Size of what will be written.
        make: Fills the folder that it is given and returns what source.json says about it.
        say: Called with one line if the folder is damaged.

    Raises:
        ValueError: If the disk is too full.
    """
    if _is_whole(folder):
        return folder
    if folder.exists():
        say(f"{folder} is damaged: making it again")
        shutil.rmtree(folder)
    with staged_folder(folder, num_bytes) as staging:
        source = make(staging)
        if (staging / _WEIGHTS_FILE).exists():
            source["model_sha256"] = sha256_of(staging / _WEIGHTS_FILE)
        (staging / _SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n")
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        source = json.loads((folder / _SOURCE_FILE).read_text())
        weights = source.get("model_sha256")
        return weights is None or sha256_of(folder / _WEIGHTS_FILE) == weights
    except (OSError, ValueError):
        return False
