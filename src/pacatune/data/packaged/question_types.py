"""Questions with the type of their answer out of a Python package, as texts of six classes.

The source archive of `bigbench` has 6,500 questions with answers about Wikipedia's articles, each
with the types that people gave the answer (Natural Instructions, subtask 46). Many got several,
often at odds; used here are those that got a single one, of the six commonest. BIG-bench asks that
its data stay out of training corpora: train throw-away models on it only.
"""

import dataclasses
import json
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pacatune.data.choices import ChoiceQuestion
from pacatune.data.packaged.cifar10 import TASK as CIFAR10
from pacatune.data.packaged.multiple_choice import write_questions
from pacatune.data.packaged.packages import prepare_folder, sha256_of

TASK = dataclasses.replace(
    CIFAR10,
    member="bigbench-1.0.0/bigbench/benchmark_tasks/natural_instructions/"
    "subtask046_miscellaenous_question_typing/task.json",
    sha256="8aea2ed4a22e6bd1f07d3879eb790bb7a8d83ae9f1a2e156050c1b8cc629d5be",
    what="questions and types of answers, in BIG-bench, Apache-2.0",
    otherwise="or give data: `options: {data: {path: FILE, eval_path: FILE}}`",
)
CLASSES = ("Date", "Entity", "Humans", "Location", "Organization", "Quantity")
TEST_SHARE = 0.3
PROMPT = "{}\nType:"

_FOLDER, _CHOICES_FOLDER = "question-types", "question-types-choices"
_NUM_BYTES = 2_000_000


def prepare_question_types(cache: Path, say: Callable[[str], None] = print) -> tuple[Path, Path]:
    """Return train.jsonl and test.jsonl with columns `text` and `label`, made the first time.

    Args:
        cache: Folder that keeps them for the next time; see `default_cache`.
        say: Called with one line per step that takes a while.

    Raises:
        ValueError: If a hash differs.
        OSError: If the package cannot be downloaded, or the disk is too full.
    """

    def make(folder: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="pacatune-") as scratch:
            task = json.loads(TASK.find(Path(scratch), say).read_bytes())
        rows = single_types(task["examples"])
        parts = split_by_question(rows, TEST_SHARE)
        for name, part in zip(("train", "test"), parts, strict=True):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        return {
            "data": TASK.what,
            "package": TASK.requirement,
            "file": TASK.member,
            "file_sha256": TASK.sha256,
            "note": "questions of a single type among the six commonest, split by question",
        }

    folder = prepare_folder(cache / _FOLDER, _NUM_BYTES, make, say)
    return folder / "train.jsonl", folder / "test.jsonl"


def prepare_type_choices(cache: Path, say: Callable[[str], None] = print) -> tuple[Path, Path]:
    """Return the same, train.jsonl and test.jsonl, for language models: to choose among the types.

    Lines are those of `prepare_multiple_choice`, in an order that mixes the types.

    Args:
        cache: Folder that keeps them for the next time; see `default_cache`.
        say: Called with one line per step that takes a while.

    Raises:
        ValueError: If a hash differs.
        OSError: If the package cannot be downloaded, or the disk is too full.
    """

    def make(folder: Path) -> dict[str, Any]:
        sources = prepare_question_types(cache, say)
        for source in sources:
            lines = source.read_text(encoding="utf-8").splitlines()
            questions = [_to_choice(json.loads(line)) for line in lines]
            random.Random(0).shuffle(questions)
            write_questions(folder / source.name, questions, chat=False)
        return {"made_of": [sha256_of(source) for source in sources]}

    folder = prepare_folder(cache / _CHOICES_FOLDER, _NUM_BYTES, make, say)
    return folder / "train.jsonl", folder / "test.jsonl"


def _to_choice(row: dict[str, str]) -> ChoiceQuestion:
    text, label = row["text"], row["label"]
    return ChoiceQuestion(text, list(CLASSES), CLASSES.index(label), PROMPT.format(text))


def single_types(examples: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return text and label of the examples with one type, if it is among `CLASSES`."""
    rows = []
    for example in examples:
        types = {str(target).rstrip(".") for target in example["target"]}
        if len(types) == 1 and (label := types.pop()) in CLASSES:
            rows.append({"text": example["input"].removeprefix("Question: "), "label": label})
    return rows


def split_by_question(
    rows: list[dict[str, str]], test_share: float
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Shuffle and split rows so that no question, compared by its words, is on both sides."""
    by_question: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        question = re.sub(r"\W+", " ", row["text"].partition("(Answer:")[0].casefold()).strip()
        by_question.setdefault(question, []).append(row)
    groups = [by_question[question] for question in sorted(by_question)]
    random.Random(0).shuffle(groups)
    train: list[dict[str, str]] = []
    test: list[dict[str, str]] = []
    for group in groups:
        (test if len(test) < test_share * len(rows) else train).extend(group)
    return train, test
