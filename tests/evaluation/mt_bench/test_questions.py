"""Questions and references: what is read, what is refused."""

import json

import pytest

from pacatune.evaluation.mt_bench.questions import (
    NEEDS_REFERENCE,
    TEMPERATURES,
    Question,
    add_references,
    choose_questions,
    read_questions,
    read_references,
)
from tests.evaluation.mt_bench.conftest import answer_row, question_rows, write_lines


def test_temperatures_and_references_are_those_of_fastchat():
    assert TEMPERATURES == {
        "writing": 0.7,
        "roleplay": 0.7,
        "stem": 0.1,
        "humanities": 0.1,
        "reasoning": 0,
        "math": 0,
        "coding": 0,
        "extraction": 0,
    }
    assert {"math", "reasoning", "coding"} == NEEDS_REFERENCE


def test_names_of_hub_data_sets_are_understood(tmp_path):
    row = {"prompt_id": 7, "category": "stem", "prompt": ["a", "b"], "reference": []}
    path = write_lines(tmp_path / "q.jsonl", [row])
    assert read_questions(str(path)) == [Question(id=7, category="stem", turns=("a", "b"))]


def test_hub_is_short_for_a_data_set(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "datasets.load_dataset", lambda path, *a, **k: seen.append(path) or question_rows()
    )
    monkeypatch.setattr("pacatune.data.read.check_on_hub", lambda *args, **options: None)
    assert len(read_questions("hub")) == 8
    assert seen == ["lighteval/mt-bench"]


def test_questions_may_bring_a_reference_to_both_turns(tmp_path):
    rows = question_rows(("math",), 3)
    rows[0]["reference"] = ["one", "two"]
    rows[1]["reference"] = ["one", ""]
    rows[2]["reference"] = ["one"]
    read = read_questions(str(write_lines(tmp_path / "q.jsonl", rows)))
    assert [one.reference for one in read] == [("one", "two"), None, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category": "maths"}, "row 2: unknown category 'maths'; did you mean 'math'"),
        ({"category": None}, "row 2: unknown category 'None'; choose from writing, "),
        ({"turns": ["one"]}, r"row 2: `turns` \(\"\['one'\]\"\) must be a list of 2 texts"),
        ({"turns": ["one", " "]}, "must be a list of 2 texts"),
        ({"turns": "text"}, "must be a list of 2 texts"),
        ({"question_id": None}, r"row 2: `question_id` \(None\) must be a number or a name"),
        ({"question_id": True}, r"`question_id` \(True\) must be"),
        ({"question_id": 1}, "row 2: the id 1 comes twice"),
    ],
)
def test_damaged_questions_are_refused(tmp_path, change, message):
    rows = question_rows(("math",), 2)
    rows[1] |= change
    with pytest.raises(ValueError, match=message):
        read_questions(str(write_lines(tmp_path / "q.jsonl", rows)))


def test_a_file_that_breaks_off_is_refused(tmp_path):
    path = write_lines(tmp_path / "q.jsonl", question_rows())
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="row 8: not valid JSON"):
        read_questions(str(path))


@pytest.mark.parametrize("path", ["./nowhere.jsonl", "nobody/nothing"])
def test_missing_questions(path, monkeypatch):
    def load(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(FileNotFoundError, match=r"--questions \('.*'\) is neither a file nor"):
        read_questions(path)


def test_choosing_keeps_the_first_of_each_category(questions):
    chosen = choose_questions(questions, (), 1)
    assert [one.category for one in chosen] == ["writing", "math", "coding", "stem"]
    assert [one.id for one in choose_questions(questions, ("stem", "math"), None)] == [
        11,
        12,
        21,
        22,
    ]
    with pytest.raises(ValueError, match=r"--categories: unknown category 'codng'; .*'coding'"):
        choose_questions(questions, ("codng",), None)
    with pytest.raises(ValueError, match=r"--categories \(roleplay\) leaves no question; .*coding"):
        choose_questions(questions, ("roleplay",), None)


def test_a_question_without_reference_is_named(questions):
    with pytest.raises(ValueError, match=r"file: no reference .* to 3 of .*: 12 \(math\), 31"):
        add_references(questions, {11: ("a", "b")}, "file")
    only = [one for one in questions if one.category == "stem"]
    assert add_references(only, {}, "file") == only


def test_damaged_references_are_refused(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [answer_row(1, ["one"])])
    with pytest.raises(ValueError, match="row 1: 1 turns; a reference answers both turns"):
        read_references(str(path))
    path.write_text(json.dumps({"question_id": 1, "choices": []}) + "\n")
    with pytest.raises(ValueError, match="row 1: no answer in the form of FastChat"):
        read_references(str(path))
    with pytest.raises(FileNotFoundError, match="--references"):
        read_references("./nowhere.jsonl")
