"""Where the demo keeps what it fetched once."""

import hashlib
import os
from pathlib import Path


def default_cache() -> Path:
    """Return the user's cache folder for pacatune; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pacatune"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
