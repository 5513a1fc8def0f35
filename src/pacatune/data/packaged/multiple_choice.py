"""Multiple-choice questions out of BIG-bench's Python package, split to train on and to score.

The source archive of `bigbench` is downloaded once for all of them. BIG-bench asks that its data
stay out of training corpora: train throw-away models on it only.
"""

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pacatune.data.choices import ChoiceQuestion, to_choice_question
from pacatune.data.packaged.cifar10 import TASK as _BIGBENCH
from pacatune.data.packaged.packages import PackagedFile, find_all, prepare_folder
from pacatune.data.read import Row
from pacatune.files.folder import staged_folder

NUM_HELDOUT = 400

_FOLDER = "bigbench-multiple-choice"
_NUM_BYTES = 4_000_000


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of BIG-bench."""

    member: str
    sha256: str
    prompt: str
    """What a choice follows, after a space."""


TASKS = {
    "social_iqa": Task(
        member="social_iqa",
        sha256="edc9f568b70ae6d4af0783764dbe4e4f18aa1242c675a93f534338d73a565348",
        prompt="Question: {}\nAnswer:",
    ),
    "goal_inference": Task(
        member="goal_step_wikihow/goal_inference",
        sha256="ae9d68546ae17707034b284444169b6035ea291dfab15826edaa867888090de6",
        prompt="{}",
    ),
    "fever": Task(
        member="fact_checker/fever",
        sha256="662a3bf790a249ffc5de1a7717ece27a28025904c6219bf5e7eba1c6f2b6888d",
        prompt="{}\nA:",
    ),
}
"""Who would do what next (3 choices), what a step is good for (4), is a claim true (2)."""


def prepare_multiple_choice(
    cache: Path,
    name: str,
    seed: int = 0,
    *,
    num_heldout: int = NUM_HELDOUT,
    chat: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[Path, Path]:
    """Return train.jsonl and heldout.jsonl of a task, written the first time.

    Each line can be trained on (`prompt` and `completion`, or `messages`) and scored (`question`,
    `choices`, `answer`). No question, compared without case and space, is in both files or twice
    in one.

    Args:
        cache: Folder that keeps them for the next time; see `default_cache`.
        name: One of `TASKS`.
        seed: Seed for the split and the order.
        num_heldout: Questions to score; the others are to train on.
        chat: Write the questions as chats.
        say: Called with one line per step that takes a while.

    Returns:
        The paths of train.jsonl and heldout.jsonl.

    Raises:
        ValueError: If there is no such task, not enough questions, or a hash differs.
        OSError: If the package cannot be downloaded, or the disk is too full.
    """
    if name not in TASKS:
        raise ValueError(f"`name` ({name!r}) must be one of {', '.join(TASKS)}.")
    form = "chat" if chat else "text"
    folder = cache / f"{name}-{form}-{num_heldout}-seed{seed}"
    paths = (folder / "train.jsonl", folder / "heldout.jsonl")
    if not all(path.is_file() for path in paths):
        shutil.rmtree(folder, ignore_errors=True)
        parts = split_questions(_read(_fetch(cache, say), name), seed, num_heldout)
        with staged_folder(folder, _NUM_BYTES) as staging:
            for path, questions in zip(paths, parts, strict=True):
                write_questions(staging / path.name, questions, chat=chat)
    return paths


def split_questions(
    questions: Sequence[ChoiceQuestion], seed: int, num_heldout: int
) -> tuple[list[ChoiceQuestion], list[ChoiceQuestion]]:
    """Drop repeated questions, shuffle, and split.

    Args:
        questions: Questions; the first with each text is kept.
        seed: Seed for the shuffle.
        num_heldout: Size of the second part.

    Returns:
        Questions to train on, and those held out.

    Raises:
        ValueError: If no question would be left to train on.
    """
    unique = {" ".join(one.question.casefold().split()): one for one in reversed(questions)}
    if not 0 < num_heldout < len(unique):
        raise ValueError(
            f"`num_heldout` ({num_heldout}) must be in [1, {len(unique) - 1}]: there are "
            f"{len(unique)} questions, and some must be left to train on."
        )
    shuffled = [unique[key] for key in sorted(unique)]
    random.Random(seed).shuffle(shuffled)
    return shuffled[num_heldout:], shuffled[:num_heldout]


def write_questions(path: Path, questions: Sequence[ChoiceQuestion], *, chat: bool) -> None:
    """Write questions as JSON Lines; see `ChoiceQuestion.row`."""
    with path.open("w", encoding="utf-8") as file:
        for question in questions:
            file.write(json.dumps(question.row(chat=chat), ensure_ascii=False) + "\n")


def _read(folder: Path, name: str) -> list[ChoiceQuestion]:
    path = folder / f"{name}.json"
    examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
    rows = (Row(f"{path}, example {number}", each) for number, each in enumerate(examples, 1))
    found = [to_choice_question(row) for row in rows]
    return [replace(one, prompt=TASKS[name].prompt.format(one.question)) for one in found]


def _fetch(cache: Path, say: Callable[[str], None]) -> Path:
    """Return the folder with the tasks' files as they are in the package."""
    files = {
        name: PackagedFile(
            package=_BIGBENCH.package,
            version=_BIGBENCH.version,
            archive_sha256=_BIGBENCH.archive_sha256,
            num_megabytes=_BIGBENCH.num_megabytes,
            member=f"bigbench-1.0.0/bigbench/benchmark_tasks/{task.member}/task.json",
            sha256=task.sha256,
            what="multiple choice of BIG-bench, Apache-2.0",
            is_source=True,
            otherwise="or give questions of your own",
        )
        for name, task in TASKS.items()
    }

    def make(folder: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="pacatune-") as scratch:
            found = find_all(list(files.values()), Path(scratch), say)
            for name, path in zip(files, found, strict=True):
                shutil.copyfile(path, folder / f"{name}.json")
        return {
            "package": _BIGBENCH.requirement,
            "files": {file.member: file.sha256 for file in files.values()},
            "note": "BIG-bench asks that this data stay out of training corpora",
        }

    return prepare_folder(cache / _FOLDER, _NUM_BYTES, make, say)
