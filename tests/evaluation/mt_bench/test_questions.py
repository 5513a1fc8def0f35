"""Questions and references: what is read, what is refused."""

import json

import pytest

from pacatune.evaluation.mt_bench import MtBenchConfig
from pacatune.evaluation.mt_bench.questions import (
    NEEDS_REFERENCE,
    TEMPERATURES,
    Question,
    add_references,
    choose_questions,
    load_data,
    read_prompts,
    read_questions,
    read_references,
    render,
)
from tests.evaluation.mt_bench.conftest import (
    PROMPTS,
    answer_row,
    prompt_rows,
    question_rows,
    write_lines,
)


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
    with pytest.raises(ValueError, match=r"row 8: .*a .jsonl file has one object"):
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


ANSWERS = ("first {answer}", "second")


def of(questions, category):
    return next(one for one in questions if one.category == category)


def test_each_kind_of_question_and_turn_has_its_prompt(prompts, questions):
    kinds = {
        (category, turn): render(prompts, of(questions, category), ANSWERS, turn).name
        for category in ("writing", "math")
        for turn in (1, 2)
    }
    assert kinds == {
        ("writing", 1): "single-v1",
        ("writing", 2): "single-v1-multi-turn",
        ("math", 1): "single-math-v1",
        ("math", 2): "single-math-v1-multi-turn",
    }


def test_places_are_filled_and_braces_in_texts_stay(prompts, questions):
    for category in ("writing", "coding"):
        question = of(questions, category)
        first, second = (render(prompts, question, ANSWERS, turn) for turn in (1, 2))
        assert (first.system, second.system) == (PROMPTS[first.name][0], PROMPTS[second.name][0])
        assert question.turns[0] in first.user
        assert "first {answer}" in first.user
        assert question.turns[1] not in first.user
        assert all(text in second.user for text in (*question.turns, *ANSWERS))
        has_reference = category == "coding"
        assert ("reference one" in first.user) == has_reference
        assert ("reference two" in first.user) is False
        assert ("reference one" in second.user) == has_reference
        assert ("reference two" in second.user) == has_reference


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "other"}, "has no prompt named 'single-v1'; add FastChat's"),
        ({"output_format": "[[A]]"}, r"row 1: 'single-v1' needs the texts .* and '\[\[rating\]\]'"),
        ({"system_prompt": None}, "needs the texts `system_prompt`"),
        ({"prompt_template": "{question}"}, "has the places question; it must have exactly answer"),
        ({"prompt_template": "{question} {answer.__class__}"}, r"has the places answer.__class__"),
        ({"prompt_template": "{question} {answer!r}"}, "it must have exactly answer, question"),
        ({"prompt_template": "{question:>9} {answer}"}, "it must have exactly answer, question"),
        ({"prompt_template": "{question} {answer} }"}, "write a brace that is text twice"),
    ],
)
def test_prompts_that_show_something_else_are_refused(tmp_path, change, message):
    rows = prompt_rows()
    rows[0] |= change
    with pytest.raises(ValueError, match=message):
        read_prompts(write_lines(tmp_path / "p.jsonl", rows))


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="--judge-prompts"):
        read_prompts(tmp_path / "p.jsonl")


def load(files, **options):
    config = {
        "output": "unused",
        "model": "m",
        "judge_url": "http://localhost",
        "questions": str(files["questions"]),
        "judge_prompts": files["judge-prompts"],
    }
    return load_data(MtBenchConfig(**config | options))


def test_all_out_of_files(files):
    data = load(files, references=str(files["references"]))
    assert len(data.questions) == 8
    assert all((one.reference is not None) == one.needs_reference for one in data.questions)
    assert data.sources == {
        "questions": str(files["questions"]),
        "references": str(files["references"]),
        "judge_prompts": str(files["judge-prompts"]),
    }


def test_answering_alone_needs_neither_prompts_nor_references(files):
    data = load(files, judge_url=None, no_judge=True, judge_prompts=None)
    assert data.prompts == {}


def test_references_that_come_with_the_questions(files, tmp_path):
    rows = [row | {"reference": ["own", "own"]} for row in question_rows()]
    path = str(write_lines(tmp_path / "own.jsonl", rows))
    data = load(files, questions=path)
    assert data.sources["references"] == path
    assert {one.reference for one in data.questions if one.needs_reference} == {("own", "own")}
    with pytest.raises(ValueError, match=r"no reference answer to 4 of .*: 11 \(math\)"):
        load(files)


def test_a_file_of_references_must_hold_them_all(files, tmp_path):
    path = str(write_lines(tmp_path / "r.jsonl", [answer_row(11, ["a", "b"])]))
    with pytest.raises(ValueError, match=r"r.jsonl: no reference answer to 3 .*12 \(math\), 31"):
        load(files, references=path)
    assert load(files, references=path, categories=("math",), limit=1).questions
