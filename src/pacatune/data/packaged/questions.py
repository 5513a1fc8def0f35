"""Question/answer pairs from `chatterbot-corpus` as chat data, split without overlap.

The corpus (BSD licence, written by its users) answers like a laconic robot: short, in the first
person, sometimes wrong. It shows a change of style in few steps; it is no source of facts.
"""

import importlib.util
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pacatune.data.packaged.packages import prepare_rows
from pacatune.installation import install_command

CORPUS = "chatterbot-corpus"
NUM_HELDOUT = 96
MAX_ANSWER_CHARS = 200
# Programs would be most of the tokens and have another style than the rest.
_SKIPPED_TOPICS = frozenset({"coding"})


def prepare_questions(cache: Path, seed: int = 0) -> tuple[Path, Path]:
    """Return train.jsonl and heldout.jsonl, written the first time, in an order set by `seed`.

    Each line is `{"messages": [user, assistant]}`. No question and no answer (compared without
    case and punctuation) is in both files.
    """

    def make() -> list[list[dict[str, Any]]]:
        parts = split_pairs(list(unique_pairs(_read_corpus())), seed)
        return [[_to_chat(*pair) for pair in part] for part in parts]

    folder = cache / f"{CORPUS}-seed{seed}"
    return prepare_rows(folder, ("train.jsonl", "heldout.jsonl"), 2**20, make)


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

    More than `num_heldout` are held out if the last answer has several questions.
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


def _to_chat(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }
