"""Texts, questions and images of packages, split to train on and to measure.

Each function fills a folder. BIG-bench asks that its data stay out of training corpora: train
throw-away models on it only.
"""

import base64
import gzip
import io
import json
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

CLASSES = ("Date", "Entity", "Humans", "Location", "Organization", "Quantity")
_NUM_CHATS_HELD_OUT, _NUM_IMAGES_HELD_OUT, _NUM_DIGITS_HELD_OUT = 96, 200, 100
_TYPES_HELD_OUT = 0.3
_NUM_PROBLEMS, _NUM_PROBLEMS_HELD_OUT = 3000, 300
_MAX_ANSWER_CHARS = 200
# Kinds of problems of reasoning-gym with short questions and answers.
_REASONING = (
    "sentence_reordering",
    "spell_backward",
    "calendar_arithmetic",
    "letter_counting",
    "complex_arithmetic",
    "prime_factorization",
    "simple_equations",
    "chain_sum",
    "coin_flip",
    "number_sequence",
)
_NUM_PER_KIND, _NUM_PER_KIND_HELD_OUT, _MAX_PROBLEM_CHARS = 420, 20, 160

Row = dict[str, Any]


def _write(folder: Path, train: Iterable[Row], test: Iterable[Row]) -> None:
    folder.mkdir(exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _normalise(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", "", text.casefold()).split())


def make_chats(files: list[Path], folder: Path) -> None:
    """Write the chats of chatterbot-corpus; no question and no answer is on both sides.

    The corpus answers like a laconic robot: short, in the first person, sometimes wrong. It shows a
    change of style in few steps; it is no source of facts.
    """
    pairs = sorted(unique_pairs(_conversations(files)))
    random.Random(0).shuffle(pairs)
    answers = {_normalise(answer) for _, answer in pairs[:_NUM_CHATS_HELD_OUT]}
    train = [_chat(*pair) for pair in pairs if _normalise(pair[1]) not in answers]
    _write(folder, train, [_chat(*pair) for pair in pairs if _normalise(pair[1]) in answers])


def _conversations(files: list[Path]) -> Iterator[tuple[str, str]]:
    """Yield the first two lines of each conversation."""
    import yaml

    for path in files:
        # Programs would be most of the tokens and have another style than the rest.
        if path.stem != "coding":
            for lines in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
                if len(lines) >= 2:
                    yield str(lines[0]), str(lines[1])


def unique_pairs(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield the first answer of each question; drop long answers and empty texts."""
    seen = set()
    for question, answer in pairs:
        question, answer = " ".join(question.split()), " ".join(answer.split())
        key = _normalise(question)
        if key and _normalise(answer) and len(answer) <= _MAX_ANSWER_CHARS and key not in seen:
            seen.add(key)
            yield question, answer


def _chat(question: str, answer: str) -> Row:
    asked = {"role": "user", "content": question}
    return {"messages": [asked, {"role": "assistant", "content": answer}]}


def make_images(files: list[Path], folder: Path) -> None:
    """Write CIFAR-10's test images as PNG files, 800 of each class to train on and 200 to test.

    So an accuracy on them is not the one papers report.
    """
    by_class: dict[str, list[tuple[int, bytes]]] = {}
    for number, example in enumerate(_examples(files[0])):
        name = max(example["target_scores"], key=example["target_scores"].get)
        by_class.setdefault(name, []).append((number, base64.b64decode(example["input"])))
    _write_images(folder, by_class, _NUM_IMAGES_HELD_OUT)


def make_digits(files: list[Path], folder: Path) -> None:
    """Write 5,000 of MNIST's images as PNG files, 400 of each class to train on and 100 to test."""
    from PIL import Image

    by_class: dict[str, list[tuple[int, bytes]]] = {}
    with gzip.open(files[0], "rt") as lines:
        for number, line in enumerate(lines):
            *pixels, label = (int(value) for value in line.split(","))
            content = io.BytesIO()
            Image.frombytes("L", (28, 28), bytes(pixels)).save(content, "PNG")
            by_class.setdefault(str(label), []).append((number, content.getvalue()))
    _write_images(folder, by_class, _NUM_DIGITS_HELD_OUT)


def _write_images(
    folder: Path, by_class: dict[str, list[tuple[int, bytes]]], num_held_out: int
) -> None:
    for name in sorted(by_class):
        random.Random(name).shuffle(by_class[name])
        for place, (number, content) in enumerate(by_class[name]):
            part = "test" if place < num_held_out else "train"
            path = folder / part / name / f"{number:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _examples(path: Path) -> list[dict[str, Any]]:
    examples: list[dict[str, Any]] = json.loads(path.read_bytes())["examples"]
    return examples


def make_question_types(files: list[Path], folder: Path) -> None:
    """Write questions with answers about Wikipedia's articles, and the type of the answer.

    People gave the types (Natural Instructions, subtask 46). Many questions got several, often at
    odds; used are those that got a single one, of the six commonest.
    """
    _write(folder, *split_by_question(single_types(_examples(files[0]))))


def make_type_choices(files: list[Path], folder: Path) -> None:
    """Write the same for language models, which choose among the types; rows mix the types."""
    parts = []
    for rows in split_by_question(single_types(_examples(files[0]))):
        random.Random(0).shuffle(rows)
        parts.append([_type_choice(row["text"], row["label"]) for row in rows])
    _write(folder, *parts)


def _type_choice(question: str, label: str) -> Row:
    asked = {"question": question, "choices": [*CLASSES], "answer": CLASSES.index(label)}
    return {"prompt": f"{question}\nType:", "completion": f" {label}", **asked}


def single_types(examples: list[dict[str, Any]]) -> list[Row]:
    """Return text and label of the examples with one type, if it is among `CLASSES`."""
    rows = []
    for example in examples:
        types = {str(target).rstrip(".") for target in example["target"]}
        if len(types) == 1 and (label := types.pop()) in CLASSES:
            rows.append({"text": example["input"].removeprefix("Question: "), "label": label})
    return rows


def split_by_question(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Shuffle and split rows so that no question, compared by its words, is on both sides."""
    by_question: dict[str, list[Row]] = {}
    for row in rows:
        question = re.sub(r"\W+", " ", row["text"].partition("(Answer:")[0].casefold()).strip()
        by_question.setdefault(question, []).append(row)
    groups = [by_question[question] for question in sorted(by_question)]
    random.Random(0).shuffle(groups)
    train: list[Row] = []
    test: list[Row] = []
    for group in groups:
        (test if len(test) < _TYPES_HELD_OUT * len(rows) else train).extend(group)
    return train, test


def make_reversed_words(files: list[Path], folder: Path) -> None:
    """Write lists of words to reverse."""
    _write_lists(folder, "Reverse: {}\nReversed:", lambda words: words[::-1])


def make_sorted_words(files: list[Path], folder: Path) -> None:
    """Write the same lists, to be sorted."""
    _write_lists(folder, "Sort: {}\nSorted:", sorted)


def _write_lists(folder: Path, question: str, order: Callable[[list[str]], list[str]]) -> None:
    """Write lists of words made by reasoning-gym; no prompt is in both files, or twice.

    Its own words around a problem, and its hints on the format, would be most of the tokens.
    """
    number = _NUM_PROBLEMS + _NUM_PROBLEMS_HELD_OUT
    found: dict[str, Row] = {}
    # More than are wanted, since some come twice.
    for item in _problems("word_sequence_reversal", 4 * number, min_words=3, max_words=6):
        words = item["metadata"]["words"]
        prompt = question.format(", ".join(words))
        found.setdefault(prompt, {"prompt": prompt, "completion": f" {', '.join(order(words))}"})
    rows = list(found.values())[:number]
    _write(folder, rows[_NUM_PROBLEMS_HELD_OUT:], rows[:_NUM_PROBLEMS_HELD_OUT])


def make_reasoning(files: list[Path], folder: Path) -> None:
    """Write short problems of the kinds of `_REASONING`, mixed; no prompt comes twice."""
    train: list[Row] = []
    test: list[Row] = []
    for kind in _REASONING:
        found: dict[str, Row] = {}
        for item in _problems(kind, 3 * _NUM_PER_KIND):
            prompt = " ".join(item["question"].split()) + "\nAnswer:"
            if len(prompt) < _MAX_PROBLEM_CHARS:
                found.setdefault(prompt, {"prompt": prompt, "completion": f" {item['answer']}"})
        rows = list(found.values())[:_NUM_PER_KIND]
        test += rows[:_NUM_PER_KIND_HELD_OUT]
        train += rows[_NUM_PER_KIND_HELD_OUT:]
    for rows in (train, test):
        random.Random(0).shuffle(rows)
    _write(folder, train, test)


def _problems(kind: str, number: int, **options: Any) -> Any:
    with warnings.catch_warnings():  # of the code of what it imports, where that is compiled anew
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym

    return reasoning_gym.create_dataset(kind, seed=0, size=number, **options)
