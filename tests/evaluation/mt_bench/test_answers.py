"""Answers on disk, ours and others'."""

import json

import pytest

from pacatune.evaluation.mt_bench.answering import AnswerFile, read_answers
from pacatune.evaluation.mt_bench.questions import Question
from tests.evaluation.mt_bench.conftest import answer_row, write_lines

QUESTION = Question(id=81, category="writing", turns=("a", "b"))


@pytest.fixture
def file(tmp_path):
    return AnswerFile(tmp_path / "model_answer" / "m.jsonl", "m")


def test_answers_grow_turn_by_turn_and_end_in_the_form_of_fastchat(file):
    assert file.turns(QUESTION) == ()
    file.add(QUESTION, "one", {"seed": 1})
    again = AnswerFile(file.path, "m")
    assert again.turns(QUESTION) == ("one",)
    assert not again.is_complete(QUESTION)
    again.add(QUESTION, "two", {"seed": 2})
    assert again.is_complete(QUESTION)
    assert AnswerFile(file.path, "m").turns(QUESTION) == ("one", "two")
    again.tidy()
    (row,) = map(json.loads, file.path.read_text().splitlines())
    assert row.keys() >= {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert (row["question_id"], row["model_id"]) == (81, "m")
    assert row["choices"] == [{"index": 0, "turns": ["one", "two"]}]
    assert row["details"] == again.details(QUESTION) == {"seed": [1, 2]}


def test_an_answer_to_another_text_is_refused(file):
    file.add(QUESTION, "one", {})
    changed = Question(id=81, category="writing", turns=("a", "c"))
    with pytest.raises(ValueError, match=r"answers another question 81; .*--output DIR"):
        AnswerFile(file.path, "m").turns(changed)


def test_a_cut_line_costs_one_turn(file):
    file.add(QUESTION, "one", {})
    file.add(QUESTION, "two", {})
    file.path.write_bytes(file.path.read_bytes()[:-10])
    repaired = AnswerFile(file.path, "m")
    assert "was cut off; it is removed" in repaired.notes[0]
    assert repaired.turns(QUESTION) == ("one",)


@pytest.mark.parametrize(
    "row",
    [{"choices": "x", "question_id": 1}, {"question_id": 1}, {"question_id": 1, "choices": [1]}],
)
def test_rows_of_another_form_are_refused(tmp_path, row):
    path = write_lines(tmp_path / "m.jsonl", [row])
    with pytest.raises(ValueError, match="answer 1: no answer in the form of FastChat"):
        AnswerFile(path, "m")


def test_a_row_without_question_is_refused(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", [answer_row(None, ["a"])])
    with pytest.raises(ValueError, match=r"answer 1: `question_id` \(None\) must be"):
        AnswerFile(path, "m")


def test_answers_of_others(tmp_path):
    rows = [answer_row(81, ["old", "old"]), answer_row(81, ["one", "two"]), answer_row(5, ["x"])]
    path = str(write_lines(tmp_path / "a.jsonl", rows))
    assert read_answers(path, [QUESTION]) == ("model-a", {81: ("one", "two")})


def test_answers_of_others_must_be_whole_and_of_one_model(tmp_path):
    questions = [QUESTION, Question(id=82, category="math", turns=("a", "b"))]
    rows = [answer_row(81, ["one", "two"]), answer_row(82, ["one"])]
    path = str(write_lines(tmp_path / "a.jsonl", rows))
    with pytest.raises(ValueError, match=r"not answer both turns of 1 of 2 questions: 82; add"):
        read_answers(path, questions)
    rows.append(answer_row(82, ["one", "two"], "model-b"))
    path = str(write_lines(tmp_path / "a.jsonl", rows))
    with pytest.raises(ValueError, match="holds answers of model-a, model-b; give a file for each"):
        read_answers(path, questions)
    with pytest.raises(FileNotFoundError, match=r"--answers \('nowhere.jsonl'\) is no file"):
        read_answers("nowhere.jsonl", questions)
