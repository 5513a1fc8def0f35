"""Packaged texts and images: what is kept, and that nothing held out is trained on."""

import base64
import gzip
import io
import json

import pytest
from PIL import Image

from examples.images import load_images
from examples.packaged import data as packaged


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def task_file(folder, examples):
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps({"examples": examples}))
    return folder / "task.json"


def image(index):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (index, 0, 0)).save(file, "PNG")
    scores = {name: int(place == index % 2) for place, name in enumerate(("cat", "dog"))}
    return {"input": base64.b64encode(file.getvalue()).decode(), "target_scores": scores}


def test_images_are_split_by_class_and_kept_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "_NUM_IMAGES_HELD_OUT", 3)
    rows = [image(index) for index in range(20)]
    folder = tmp_path / "images"
    packaged.make_images([task_file(tmp_path / "source", rows)], folder)
    train, test = load_images(folder)
    assert train.features["label"].names == ["cat", "dog"]
    assert (len(train), len(test)) == (14, 6)
    assert len({path.name for path in folder.rglob("*.png")}) == 20  # none in both parts
    for path in folder.rglob("*.png"):
        assert path.read_bytes() == base64.b64decode(rows[int(path.stem)]["input"])
        assert path.parent.name == ("cat", "dog")[int(path.stem) % 2]


def test_digits_are_split_by_class_and_keep_their_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "_NUM_DIGITS_HELD_OUT", 1)
    rows = [[(index * place) % 256 for place in range(28 * 28)] for index in range(6)]
    with gzip.open(tmp_path / "digits.csv.gz", "wt") as file:
        file.writelines(f"{','.join(map(str, row))},{i % 2 + 3}\n" for i, row in enumerate(rows))
    packaged.make_digits([tmp_path / "digits.csv.gz"], tmp_path / "images")
    train, test = load_images(tmp_path / "images")
    assert train.features["label"].names == ["3", "4"]
    assert (len(train), len(test)) == (4, 2)
    for path in (tmp_path / "images").rglob("*.png"):
        assert list(Image.open(path).tobytes()) == rows[int(path.stem)]
        assert path.parent.name == str(int(path.stem) % 2 + 3)


def typed(text, *types):
    return {"input": f"Question: {text}", "target": [f"{name}." for name in types]}


EXAMPLES = [
    typed("Who wrote it? (Answer: Bo).", "Humans"),
    typed("When? (Answer: 1922).", "Date"),
    typed("When? (Answer: in May).", "Date"),
    typed("Which? (Answer: x).", "Entity", "Humans"),
    typed("How dear? (Answer: 3).", "Money"),
    *(typed(f"Where is {n}? (Answer: there).", "Location") for n in range(7)),
]


def test_questions_of_one_of_six_types_and_none_on_both_sides(tmp_path):
    files = [task_file(tmp_path / "source", EXAMPLES)]
    packaged.make_question_types(files, tmp_path)
    train, test = read(tmp_path / "train.jsonl"), read(tmp_path / "test.jsonl")
    assert {"text": "Who wrote it? (Answer: Bo).", "label": "Humans"} in train + test
    labels = sorted(row["label"] for row in train + test)
    assert labels == ["Date", "Date", "Humans", *["Location"] * 7]
    assert 3 <= len(test) <= 4
    asked = [{row["text"].partition(" (")[0] for row in part} for part in (train, test)]
    assert not asked[0] & asked[1]
    (tmp_path / "choices").mkdir()
    packaged.make_type_choices(files, tmp_path / "choices")
    choices = read(tmp_path / "choices" / "train.jsonl")
    assert sorted((c["question"], c["choices"][c["answer"]]) for c in choices) == sorted(
        (row["text"], row["label"]) for row in train
    )
    for row in choices:
        assert row["prompt"] == f"{row['question']}\nType:"
        assert row["completion"] == f" {row['choices'][row['answer']]}"


def test_chats(tmp_path, monkeypatch):
    """The first answer of a question is kept; no question and no answer is on both sides."""
    monkeypatch.setattr(packaged, "_NUM_CHATS_HELD_OUT", 5)
    pairs = [("Hello", "Hi"), ("hello!", "Greetings"), ("Who?", ""), ("Why?", "x" * 201)]
    assert list(packaged.unique_pairs(pairs)) == [("Hello", "Hi")]
    pairs = [[f"q{i}", "same" if i % 2 else f"a{i}", "more"] for i in range(20)]
    (tmp_path / "topic.yml").write_text(json.dumps({"conversations": [*pairs, ["alone"]]}))
    (tmp_path / "coding.yml").write_text(json.dumps({"conversations": [["code", "code"]]}))
    packaged.make_chats([tmp_path / "coding.yml", tmp_path / "topic.yml"], tmp_path)
    answers = [
        {row["messages"][1]["content"] for row in read(tmp_path / f"{part}.jsonl")}
        for part in ("train", "test")
    ]
    assert answers[0].isdisjoint(answers[1])
    assert answers[0] | answers[1] == {"same", *(f"a{i}" for i in range(0, 20, 2))}


def test_problems_of_reasoning(tmp_path):
    pytest.importorskip("reasoning_gym")
    packaged.make_reversed_words([], tmp_path)
    train, test = read(tmp_path / "train.jsonl"), read(tmp_path / "test.jsonl")
    assert (len(train), len(test)) == (3000, 300)
    assert len({row["prompt"] for row in train + test}) == 3300
    for row in test:
        words = row["prompt"].removeprefix("Reverse: ").removesuffix("\nReversed:").split(", ")
        assert row["completion"] == " " + ", ".join(reversed(words))
    packaged.make_sorted_words([], tmp_path)
    for row in read(tmp_path / "test.jsonl"):
        words = row["prompt"].removeprefix("Sort: ").removesuffix("\nSorted:").split(", ")
        assert row["completion"] == " " + ", ".join(sorted(words))
    packaged.make_reasoning([], tmp_path)
    train, test = read(tmp_path / "train.jsonl"), read(tmp_path / "test.jsonl")
    assert len(test) == 10 * 20
    assert 3800 < len(train) <= 10 * 400  # a few are too long
    assert len({row["prompt"] for row in train + test}) == len(train + test)
    assert all(row["completion"].strip() for row in train + test)
