"""Images and questions out of BIG-bench's Python package, split to train on and to measure.

BIG-bench asks that its data stay out of training corpora: train throw-away models on it only.
"""

import base64
import json
import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pacatune.data.choices import ChoiceQuestion, to_choice_question
from pacatune.data.packaged.packages import PackagedFiles, Say, prepare_rows, write_rows
from pacatune.data.read import Row

_TASKS = "bigbench-1.0.0/bigbench/benchmark_tasks"
_bigbench = partial(
    PackagedFiles,
    package="bigbench",
    version="1.0.0",
    archive_sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    num_megabytes=358,
    is_source=True,
)
_NOTE = "BIG-bench asks that this data stay out of training corpora"

CIFAR10 = _bigbench(
    files={
        f"{_TASKS}/cifar10_classification/base64/task.json": (
            "226298409875f5b93ccda063863181f88723d39bac7eeef28a79843ae0aace31"
        )
    },
    what="the test images of CIFAR-10, in BIG-bench, Apache-2.0",
    otherwise="or give images: --data FOLDER",
)
NUM_TEST_PER_CLASS = 200

QUESTION_TYPES = _bigbench(
    files={
        f"{_TASKS}/natural_instructions/subtask046_miscellaenous_question_typing/task.json": (
            "8aea2ed4a22e6bd1f07d3879eb790bb7a8d83ae9f1a2e156050c1b8cc629d5be"
        )
    },
    what="questions and types of answers, in BIG-bench, Apache-2.0",
    otherwise="or give data: `options: {data: {path: FILE, eval_path: FILE}}`",
)
CLASSES = ("Date", "Entity", "Humans", "Location", "Organization", "Quantity")
TEST_SHARE = 0.3
TYPE_PROMPT = "{}\nType:"

NUM_HELDOUT = 400


@dataclass(frozen=True, kw_only=True)
class ChoiceTask:
    """One multiple-choice task."""

    folder: str
    sha256: str
    """Hash of its task.json."""
    prompt: str
    """What a choice follows, after a space."""


CHOICE_TASKS = {
    "social_iqa": ChoiceTask(
        folder="social_iqa",
        sha256="edc9f568b70ae6d4af0783764dbe4e4f18aa1242c675a93f534338d73a565348",
        prompt="Question: {}\nAnswer:",
    ),
    "goal_inference": ChoiceTask(
        folder="goal_step_wikihow/goal_inference",
        sha256="ae9d68546ae17707034b284444169b6035ea291dfab15826edaa867888090de6",
        prompt="{}",
    ),
    "fever": ChoiceTask(
        folder="fact_checker/fever",
        sha256="662a3bf790a249ffc5de1a7717ece27a28025904c6219bf5e7eba1c6f2b6888d",
        prompt="{}\nA:",
    ),
}
"""Who would do what next (3 choices), what a step is good for (4), is a claim true (2)."""


def prepare_cifar10(cache: Path, say: Say = print) -> Path:
    """Return a folder with `train` (800 per class) and `test` (200 per class), as PNG files.

    Both are parts of CIFAR-10's test images, so an accuracy on them is not the one papers report.
    """

    def make(paths: list[Path], staging: Path) -> None:
        examples = json.loads(paths[0].read_bytes())["examples"]
        say(f"writing {len(examples):,} images to {folder}")
        write_images(examples, staging, NUM_TEST_PER_CLASS)

    folder = cache / "cifar10-test-images"
    note = "a split of the test images, so not the usual accuracy on CIFAR-10"
    return CIFAR10.prepare(folder, 60_000_000, make, say, note=note)


def write_images(examples: list[dict[str, Any]], folder: Path, num_test_per_class: int) -> None:
    """Write PNG files, in base64 as `input`, by part and class, the test part chosen at random."""
    by_class: dict[str, list[tuple[int, str]]] = {}
    for number, example in enumerate(examples):
        name = max(example["target_scores"], key=example["target_scores"].get)
        by_class.setdefault(name, []).append((number, example["input"]))
    for name in sorted(by_class):
        random.Random(name).shuffle(by_class[name])
        for place, (number, content) in enumerate(by_class[name]):
            part = "test" if place < num_test_per_class else "train"
            path = folder / part / name / f"{number:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(content))


def prepare_multiple_choice(
    cache: Path,
    name: str,
    seed: int = 0,
    *,
    num_heldout: int = NUM_HELDOUT,
    chat: bool = False,
    say: Say = print,
) -> tuple[Path, Path]:
    """Return train.jsonl and heldout.jsonl of one of `CHOICE_TASKS`, written the first time.

    Each line can be trained on (`prompt` and `completion`, or with `chat` `messages`) and scored
    (`question`, `choices`, `answer`). No question, compared without case and space, is in both
    files or twice in one.
    """
    if name not in CHOICE_TASKS:
        raise ValueError(f"`name` ({name!r}) must be one of {', '.join(CHOICE_TASKS)}.")

    def make() -> list[list[dict[str, Any]]]:
        parts = split_questions(_read_choices(cache, name, say), seed, num_heldout)
        return [[question.row(chat=chat) for question in part] for part in parts]

    folder = cache / f"{name}-{'chat' if chat else 'text'}-{num_heldout}-seed{seed}"
    return prepare_rows(folder, ("train.jsonl", "heldout.jsonl"), 4_000_000, make)


def split_questions(
    questions: Sequence[ChoiceQuestion], seed: int, num_heldout: int
) -> tuple[list[ChoiceQuestion], list[ChoiceQuestion]]:
    """Drop repeated questions, shuffle, and return those to train on and those held out."""
    unique = {" ".join(one.question.casefold().split()): one for one in reversed(questions)}
    if not 0 < num_heldout < len(unique):
        raise ValueError(
            f"`num_heldout` ({num_heldout}) must be in [1, {len(unique) - 1}]: there are "
            f"{len(unique)} questions, and some must be left to train on."
        )
    shuffled = [unique[key] for key in sorted(unique)]
    random.Random(seed).shuffle(shuffled)
    return shuffled[num_heldout:], shuffled[:num_heldout]


def _read_choices(cache: Path, name: str, say: Say) -> list[ChoiceQuestion]:
    """Read one task; the files of all of them are fetched together, the first time."""
    files = _bigbench(
        files={f"{_TASKS}/{one.folder}/task.json": one.sha256 for one in CHOICE_TASKS.values()},
        what="multiple choice of BIG-bench, Apache-2.0",
        otherwise="or give questions of your own",
    )

    def make(paths: list[Path], staging: Path) -> None:
        for task, path in zip(CHOICE_TASKS, paths, strict=True):
            shutil.copyfile(path, staging / f"{task}.json")

    folder = cache / "bigbench-multiple-choice"
    path = files.prepare(folder, 4_000_000, make, say, note=_NOTE) / f"{name}.json"
    examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
    rows = (Row(f"{path}, example {number}", each) for number, each in enumerate(examples, 1))
    found = [to_choice_question(row) for row in rows]
    return [replace(one, prompt=CHOICE_TASKS[name].prompt.format(one.question)) for one in found]


def prepare_question_types(cache: Path, say: Say = print) -> tuple[Path, Path]:
    """Return train.jsonl and test.jsonl with columns `text` and `label`, made the first time.

    They are questions with answers about Wikipedia's articles, and the type that people gave the
    answer (Natural Instructions, subtask 46). Many got several, often at odds; used are those that
    got a single one, of the six commonest.
    """

    def make(paths: list[Path], staging: Path) -> None:
        rows = single_types(json.loads(paths[0].read_bytes())["examples"])
        train, test = split_by_question(rows, TEST_SHARE)
        write_rows(staging / "train.jsonl", train)
        write_rows(staging / "test.jsonl", test)

    folder = cache / "question-types"
    note = "questions of a single type among the six commonest, split by question"
    QUESTION_TYPES.prepare(folder, 2_000_000, make, say, note=note)
    return folder / "train.jsonl", folder / "test.jsonl"


def prepare_type_choices(cache: Path, say: Say = print) -> tuple[Path, Path]:
    """Return the same for language models, which choose among the types; rows mix the types."""

    def make() -> list[list[dict[str, Any]]]:
        parts = []
        for source in prepare_question_types(cache, say):
            lines = source.read_text(encoding="utf-8").splitlines()
            questions = [_to_choice(json.loads(line)) for line in lines]
            random.Random(0).shuffle(questions)
            parts.append([question.row() for question in questions])
        return parts

    folder = cache / "question-types-choices"
    return prepare_rows(folder, ("train.jsonl", "test.jsonl"), 2_000_000, make)


def _to_choice(row: dict[str, str]) -> ChoiceQuestion:
    text, label = row["text"], row["label"]
    return ChoiceQuestion(text, list(CLASSES), CLASSES.index(label), TYPE_PROMPT.format(text))


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
