"""Question/answer pairs from `chatterbot-corpus` as chat data, split without overlap.

The corpus (BSD licence, written by its users) answers like a laconic robot: short, in the first
person, sometimes wrong. It shows a change of style in few steps; it is no source of facts.
"""

import importlib.util
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pacatune.files.folder import staged_folder
from pacatune.installation import install_command

CORPUS = "chatterbot-corpus"
NUM_HELDOUT = 96
MAX_ANSWER_CHARS = 200
# Programs would be most of the tokens and have another style than the rest.
_SKIPPED_TOPICS = frozenset({"coding"})


def prepare_questions(cache: Path, seed: int = 0) -> tuple[Path, Path]:
    """Return train.jsonl and heldout.jsonl, written the first time.

    Each line is `{"messages": [user, assistant]}`. No question and no answer (compared without
    case and punctuation) is in both files.

    Args:
        cache: Folder that keeps them for the next time; see `default_cache`.
        seed: Seed for the split and the order.

    Returns:
        The paths of train.jsonl and heldout.jsonl.

    Raises:
        ValueError: If the package `chatterbot-corpus` is not installed.
    """
    folder = cache / f"{CORPUS}-seed{seed}"
    paths = (folder / "train.jsonl", folder / "heldout.jsonl")
    if not all(path.is_file() for path in paths):
        shutil.rmtree(folder, ignore_errors=True)
        train, heldout = split_pairs(list(unique_pairs(_read_corpus())), seed)
        with staged_folder(folder, num_bytes=2**20) as staging:
            _write_chats(staging / paths[0].name, train)
            _write_chats(staging / paths[1].name, heldout)
    return paths


def unique_pairs(pairs: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield the first answer of each question; drop long answers and empty texts."""
    seen = set()
    for question, answer in pairs:
        question, answer = " ".join(question.split()), " ".join(answer.split())
        key = _normalise(question)
        if key and _normalise(answer) and len(answer) <= MAX_ANSWER_CHARS and key not in seen:
            seen.add(key)
            yield question, answer


def split_pairs(
    pairs: list[tuple[str, str]], seed: int, num_heldout: int = NUM_HELDOUT
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Shuffle pairs with unique questions and split them so that no answer is on both sides.

    Args:
        pairs: (question, answer).
        seed: Seed for the shuffle.
        num_heldout: At least as many are held out; more if the last answer has several questions.

    Raises:
        ValueError: If there are not more than `num_heldout` pairs.
    """
    if len(pairs) <= num_heldout:
        raise ValueError(
            f"{len(pairs)} pairs cannot give {num_heldout} held-out ones and some to train on."
        )
    shuffled = sorted(pairs)
    random.Random(seed).shuffle(shuffled)
    answers = {_normalise(answer) for _, answer in shuffled[:num_heldout]}
    train = [pair for pair in shuffled if _normalise(pair[1]) not in answers]
    heldout = [pair for pair in shuffled if _normalise(pair[1]) in answers]
    return train, heldout


def _read_corpus() -> Iterator[tuple[str, str]]:
    """Yield the first two lines of each English conversation."""
    spec = importlib.util.find_spec("chatterbot_corpus")  # does not import the package
    if spec is None or spec.origin is None:
        raise ValueError(
            f"the package `{CORPUS}` is not installed, which holds these questions; "
            f"install it: {install_command('demo')}, or give --data."
        )
    for path in sorted((Path(spec.origin).parent / "data" / "english").glob("*.yml")):
        if path.stem in _SKIPPED_TOPICS:
            continue
        topic: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        for conversation in topic["conversations"]:
            if len(conversation) >= 2:
                yield str(conversation[0]), str(conversation[1])


def _normalise(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", "", text.casefold()).split())


def _write_chats(path: Path, pairs: list[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for question, answer in pairs:
            user = {"role": "user", "content": question}
            assistant = {"role": "assistant", "content": answer}
            file.write(json.dumps({"messages": [user, assistant]}, ensure_ascii=False) + "\n")
