"""What comes out of an archive like bigbench's: images, questions, splits, one pass through it."""

import base64
import dataclasses
import hashlib
import io
import json
import tarfile

import pytest
from PIL import Image

from pacatune.data.choices import ChoiceQuestion
from pacatune.data.config import ImageDataConfig
from pacatune.data.images.prepare import prepare_images
from pacatune.data.packaged import bigbench, packages, prepare_multiple_choice
from pacatune.data.packaged.bigbench import CHOICE_TASKS, split_questions
from pacatune.data.packaged.packages import sha256_of
from pacatune.evaluation.choice import read_questions

NAMES = ("cat", "dog")


def images(number):
    found = []
    for index in range(number):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (index, 0, 0)).save(file, "PNG")
        scores = {name: int(place == index % 2) for place, name in enumerate(NAMES)}
        content = base64.b64encode(file.getvalue()).decode()
        found.append({"input": content, "target_scores": scores})
    return found


def test_images_are_split_by_class_and_kept_bit_for_bit(tmp_path):
    rows = images(20)
    bigbench.write_images(rows, tmp_path, num_test_per_class=3)
    data = prepare_images(ImageDataConfig(path=str(tmp_path)))
    assert data.classes == list(NAMES)
    assert len(data.train) == 14
    assert len(data.evaluation) == 6
    assert data.warnings == []  # no image in both parts
    for path in tmp_path.rglob("*.png"):
        number = int(path.stem)
        assert path.read_bytes() == base64.b64decode(rows[number]["input"])
        assert path.parent.name == NAMES[number % 2]
    bigbench.write_images(rows, tmp_path / "again", num_test_per_class=3)
    parts = [
        {path.name for path in (tmp_path / part).glob("*/*")} for part in ("test", "again/test")
    ]
    assert parts[0] == parts[1]


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A source archive that pip finds, with the task in it; its setup.py is run by pip."""
    wheels = tmp_path / "archives"
    wheels.mkdir()
    name = "pacatune-probe-1.0"
    content = json.dumps({"examples": images(8)}).encode()
    setup = b"from setuptools import setup\nsetup(name='pacatune-probe', version='1.0')\n"
    info = b"Metadata-Version: 2.1\nName: pacatune-probe\nVersion: 1.0\n"
    members = {"setup.py": setup, "PKG-INFO": info, "tasks/task.json": content}
    with tarfile.open(wheels / f"{name}.tar.gz", "w:gz") as tar:
        for member, data in members.items():
            entry = tarfile.TarInfo(f"{name}/{member}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    for variable, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_CONSTRAINT": "",
    }.items():
        monkeypatch.setenv(variable, value)
    task = dataclasses.replace(
        bigbench.CIFAR10,
        package="pacatune-probe",
        version="1.0",
        archive_sha256=sha256_of(wheels / f"{name}.tar.gz"),
        files={f"{name}/tasks/task.json": hashlib.sha256(content).hexdigest()},
    )
    monkeypatch.setattr(bigbench, "CIFAR10", task)
    monkeypatch.setattr(bigbench, "NUM_TEST_PER_CLASS", 1)
    return task


def test_images_are_fetched_once(tmp_path, archive, monkeypatch):
    said = []
    folder = bigbench.prepare_cifar10(tmp_path / "cache", said.append)
    assert said[0].startswith(
        "downloading pacatune-probe 1.0 (358 MB): the test images of CIFAR-10"
    )
    assert said[1].startswith("writing 8 images to ")
    assert len(list(folder.rglob("*.png"))) == 8
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    assert bigbench.prepare_cifar10(tmp_path / "cache", said.append) == folder
    assert len(said) == 2


def test_without_a_network(tmp_path, archive, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(OSError, match=r"could not download pacatune-probe==1.0: .*--data FOLDER"):
        bigbench.prepare_cifar10(tmp_path / "cache", lambda line: None)
    assert not list((tmp_path / "cache").iterdir())


def test_archive_without_the_file(tmp_path, archive, monkeypatch):
    monkeypatch.setattr(bigbench, "CIFAR10", dataclasses.replace(archive, files={"x/y.json": ""}))
    with pytest.raises(ValueError, match=r"pacatune-probe-1\.0\.tar\.gz holds no x/y\.json"):
        bigbench.prepare_cifar10(tmp_path / "cache", lambda line: None)


def example(number):
    choices = {f"right {number}": 1, f"wrong {number}": 0, "neither": 0}
    return {"input": f"What about {number}? ", "target_scores": choices}


@pytest.fixture
def choices_archive(tmp_path, monkeypatch):
    """A source archive like bigbench's, in place of the download; counts how often it is asked."""
    path = tmp_path / "bigbench-1.0.0.tar.gz"
    task = json.dumps({"examples": [*map(example, range(12)), example(3)]}).encode()
    with tarfile.open(path, "w:gz") as tar:
        for task_name in sorted(each.folder for each in CHOICE_TASKS.values()):
            member = f"bigbench-1.0.0/bigbench/benchmark_tasks/{task_name}/task.json"
            info = tarfile.TarInfo(member)
            info.size = len(task)
            tar.addfile(info, io.BytesIO(task))
    sha256 = hashlib.sha256(task).hexdigest()
    for name, one in CHOICE_TASKS.items():
        changed = bigbench.ChoiceTask(folder=one.folder, sha256=sha256, prompt=one.prompt)
        monkeypatch.setitem(CHOICE_TASKS, name, changed)
    downloads = []

    def download(*args, **kwargs):
        downloads.append(args)
        return path

    monkeypatch.setattr(packages, "download", download)
    return downloads


def test_one_download_gives_all_tasks(tmp_path, choices_archive):
    said = []
    for name in CHOICE_TASKS:
        train, heldout = prepare_multiple_choice(
            tmp_path / "cache", name, num_heldout=4, say=said.append
        )
        assert len(read_questions(train)) == 8
        assert len(read_questions(heldout)) == 4
    assert len(choices_archive) == len(said) == 1
    assert "downloading bigbench 1.0.0 (358 MB)" in said[0]


def test_rows_can_be_trained_on_and_scored(tmp_path, choices_archive):
    train, _ = prepare_multiple_choice(tmp_path, "social_iqa", num_heldout=4, say=str)
    row = json.loads(train.read_text().splitlines()[0])
    assert row["prompt"] == f"Question: {row['question']}\nAnswer:"
    assert row["completion"] == f" {row['choices'][row['answer']]}"
    chats, _ = prepare_multiple_choice(tmp_path, "social_iqa", num_heldout=4, chat=True, say=str)
    chat = json.loads(chats.read_text().splitlines()[0])
    assert [message["role"] for message in chat["messages"]] == ["user", "assistant"]
    assert chat["messages"][0]["content"] == row["question"]


def test_seed_decides_the_split(tmp_path, choices_archive):
    first, second, other = (
        prepare_multiple_choice(tmp_path / folder, "fever", seed, num_heldout=4, say=str)
        for folder, seed in (("a", 0), ("b", 0), ("a", 1))
    )
    assert first[1].read_text() == second[1].read_text() != other[1].read_text()


def test_no_question_is_on_both_sides():
    questions = [ChoiceQuestion(f"Q {i % 9}", ["a", "b"], i % 2) for i in range(30)]
    questions.append(ChoiceQuestion("q  3", ["a", "b"], 0))
    train, heldout = split_questions(questions, 0, 3)
    texts = [one.question for one in train + heldout]
    assert sorted(texts) == [f"Q {i}" for i in range(9)]
    assert {one.question: one.answer for one in train + heldout}["Q 8"] == 0  # the first of them
    assert len(heldout) == 3


@pytest.mark.parametrize("num_heldout", [0, 2])
def test_too_few_questions(num_heldout):
    questions = [ChoiceQuestion(f"{i}", ["a", "b"], 0) for i in range(2)]
    with pytest.raises(ValueError, match=rf"`num_heldout` \({num_heldout}\) must be in \[1, 1\]"):
        split_questions(questions, 0, num_heldout)


def test_unknown_task(tmp_path):
    with pytest.raises(ValueError, match=r"`name` \('iqa'\) must be one of social_iqa, goal_inf"):
        prepare_multiple_choice(tmp_path, "iqa")


def test_file_with_another_hash(tmp_path, choices_archive, monkeypatch):
    changed = bigbench.ChoiceTask(folder=CHOICE_TASKS["fever"].folder, sha256="0" * 64, prompt="{}")
    monkeypatch.setitem(CHOICE_TASKS, "fever", changed)
    with pytest.raises(ValueError, match=r"bigbench 1\.0\.0 has 0000"):
        prepare_multiple_choice(tmp_path / "cache", "fever", num_heldout=4, say=str)
    assert not (tmp_path / "cache" / "bigbench-multiple-choice").exists()


def test_archive_without_a_member(tmp_path, choices_archive, monkeypatch):
    changed = bigbench.ChoiceTask(folder="nowhere", sha256="", prompt="{}")
    monkeypatch.setitem(CHOICE_TASKS, "fever", changed)
    with pytest.raises(ValueError, match=r"bigbench-1.0.0.tar.gz holds no .*nowhere/task.json"):
        prepare_multiple_choice(tmp_path / "cache", "fever", num_heldout=4, say=str)


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


def test_questions_of_one_of_six_types():
    rows = bigbench.single_types(EXAMPLES)
    assert rows[0] == {"text": "Who wrote it? (Answer: Bo).", "label": "Humans"}
    assert [row["label"] for row in rows] == ["Humans", "Date", "Date", *["Location"] * 7]


def test_no_question_of_a_type_is_on_both_sides():
    rows = bigbench.single_types(EXAMPLES)
    train, test = bigbench.split_by_question(rows, 0.3)
    assert sorted(r["text"] for r in train + test) == sorted(r["text"] for r in rows)
    assert 3 <= len(test) <= 4
    questions = [{r["text"].partition(" (")[0] for r in part} for part in (train, test)]
    assert not questions[0] & questions[1]
    # The order of the rows decides nothing but the order within a question.
    again = bigbench.split_by_question(rows[::-1], 0.3)[1]
    assert {row["text"] for row in again} == {row["text"] for row in test}


@pytest.fixture
def source(tmp_path, monkeypatch):
    """The file with the examples, in the place of a download."""
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"examples": EXAMPLES}))
    files = dict.fromkeys(bigbench.QUESTION_TYPES.files, sha256_of(path))
    task = dataclasses.replace(bigbench.QUESTION_TYPES, files=files)
    monkeypatch.setattr(bigbench, "QUESTION_TYPES", task)
    monkeypatch.setattr(packages.PackagedFiles, "_download", lambda self, scratch, say: [path])
    return path


def test_questions_are_written_once(source, tmp_path):
    train, test = bigbench.prepare_question_types(tmp_path / "cache", print)
    rows = [json.loads(line) for path in (train, test) for line in _lines(path)]
    assert len(rows) == 10
    source.unlink()
    assert bigbench.prepare_question_types(tmp_path / "cache", print) == (train, test)


def test_the_same_questions_to_choose_from(source, tmp_path):
    texts = bigbench.prepare_question_types(tmp_path / "cache", print)
    choices = bigbench.prepare_type_choices(tmp_path / "cache", print)
    for written, chosen in zip(texts, choices, strict=True):
        rows = [json.loads(line) for line in _lines(written)]
        questions = read_questions(chosen)
        assert sorted((q.question, q.choices[q.answer]) for q in questions) == sorted(
            (row["text"], row["label"]) for row in rows
        )
        assert all(q.context() == f"{q.question}\nType:" for q in questions)
        assert [q.question for q in questions] != [row["text"] for row in rows]
    row = json.loads(_lines(choices[0])[0])
    assert row["completion"] == f" {row['choices'][row['answer']]}"
    source.unlink()
    assert bigbench.prepare_type_choices(tmp_path / "cache", print) == choices


def _lines(path):
    return path.read_text().splitlines()
