"""Multiple choice out of a package: splits, and one pass through the archive."""

import hashlib
import io
import json
import tarfile

import pytest

from pacatune.data.choices import ChoiceQuestion
from pacatune.data.packaged import multiple_choice, packages, prepare_multiple_choice
from pacatune.data.packaged.multiple_choice import TASKS, split_questions
from pacatune.evaluation import read_questions


def example(number):
    choices = {f"right {number}": 1, f"wrong {number}": 0, "neither": 0}
    return {"input": f"What about {number}? ", "target_scores": choices}


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A source archive like bigbench's, in place of the download; counts how often it is asked."""
    path = tmp_path / "bigbench-1.0.0.tar.gz"
    task = json.dumps({"examples": [*map(example, range(12)), example(3)]}).encode()
    with tarfile.open(path, "w:gz") as tar:
        for task_name in sorted(each.member for each in TASKS.values()):
            member = f"bigbench-1.0.0/bigbench/benchmark_tasks/{task_name}/task.json"
            info = tarfile.TarInfo(member)
            info.size = len(task)
            tar.addfile(info, io.BytesIO(task))
    sha256 = hashlib.sha256(task).hexdigest()
    for name, one in TASKS.items():
        changed = multiple_choice.Task(member=one.member, sha256=sha256, prompt=one.prompt)
        monkeypatch.setitem(TASKS, name, changed)
    downloads = []

    def download(*args, **kwargs):
        downloads.append(args)
        return path

    monkeypatch.setattr(packages, "download", download)
    return downloads


def test_one_download_gives_all_tasks(tmp_path, archive):
    said = []
    for name in TASKS:
        train, heldout = prepare_multiple_choice(
            tmp_path / "cache", name, num_heldout=4, say=said.append
        )
        assert len(read_questions(train)) == 8
        assert len(read_questions(heldout)) == 4
    assert len(archive) == len(said) == 1
    assert "downloading bigbench 1.0.0 (358 MB)" in said[0]


def test_rows_can_be_trained_on_and_scored(tmp_path, archive):
    train, _ = prepare_multiple_choice(tmp_path, "social_iqa", num_heldout=4, say=str)
    row = json.loads(train.read_text().splitlines()[0])
    assert row["prompt"] == f"Question: {row['question']}\nAnswer:"
    assert row["completion"] == f" {row['choices'][row['answer']]}"
    chats, _ = prepare_multiple_choice(tmp_path, "social_iqa", num_heldout=4, chat=True, say=str)
    chat = json.loads(chats.read_text().splitlines()[0])
    assert [message["role"] for message in chat["messages"]] == ["user", "assistant"]
    assert chat["messages"][0]["content"] == row["question"]


def test_seed_decides_the_split(tmp_path, archive):
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


def test_file_with_another_hash(tmp_path, archive, monkeypatch):
    changed = multiple_choice.Task(member=TASKS["fever"].member, sha256="0" * 64, prompt="{}")
    monkeypatch.setitem(TASKS, "fever", changed)
    with pytest.raises(ValueError, match=r"bigbench 1\.0\.0 has 0000"):
        prepare_multiple_choice(tmp_path / "cache", "fever", num_heldout=4, say=str)
    assert not (tmp_path / "cache" / "bigbench-multiple-choice").exists()


def test_archive_without_a_member(tmp_path, archive, monkeypatch):
    changed = multiple_choice.Task(member="nowhere", sha256="", prompt="{}")
    monkeypatch.setitem(TASKS, "fever", changed)
    with pytest.raises(ValueError, match=r"bigbench-1.0.0.tar.gz holds no .*nowhere/task.json"):
        prepare_multiple_choice(tmp_path / "cache", "fever", num_heldout=4, say=str)
