"""Questions, references and prompts: what is read, what is refused."""

import pytest

from experiments.mt_bench.questions import (
    NEEDS_REFERENCE,
    TEMPERATURES,
    Question,
    add_references,
    read_prompts,
    read_questions,
    render,
)
from tests.experiments.mt_bench.conftest import (
    PROMPTS,
    answer_row,
    prompt_rows,
    question_rows,
    write_lines,
)

ANSWERS = ("first {answer}", "second")


def test_temperatures_and_references_are_those_of_fastchat():
    assert TEMPERATURES == {
        "writing": 0.7,
        "roleplay": 0.7,
        "reasoning": 0,
        "math": 0,
        "coding": 0,
        "extraction": 0,
        "stem": 0.1,
        "humanities": 0.1,
    }
    assert {"math", "reasoning", "coding"} == NEEDS_REFERENCE


def test_names_of_hub_data_sets_are_understood(tmp_path):
    row = {"prompt_id": 7, "category": "stem", "prompt": ["a", "b"], "reference": []}
    path = write_lines(tmp_path / "q.jsonl", [row])
    assert read_questions(str(path)) == [Question(id=7, category="stem", turns=("a", "b"))]


def test_questions_may_bring_a_reference_to_both_turns(tmp_path):
    rows = question_rows(("math",), 3)
    rows[0]["reference"] = ["one", "two"]
    rows[1]["reference"] = ["one", ""]
    rows[2]["reference"] = ["one"]
    read = read_questions(str(write_lines(tmp_path / "q.jsonl", rows)))
    assert [one.reference for one in read] == [("one", "two"), None, None]
    assert add_references(read[:1], None) == read[:1]
    with pytest.raises(ValueError, match=r"questions has no reference to both turns of 2, 3, wh"):
        add_references(read, None)


@pytest.mark.parametrize(
    "change",
    [
        {"category": "maths"},
        {"turns": ["one"]},
        {"turns": ["one", " "]},
        {"turns": "text"},
        {"question_id": None},
        {"question_id": 1},
    ],
)
def test_damaged_questions_are_refused(tmp_path, change):
    rows = question_rows(("math",), 2)
    rows[1] |= change
    with pytest.raises(ValueError, match=r"row 2: .* needs a `question_id` of its own, as `turns`"):
        read_questions(str(write_lines(tmp_path / "q.jsonl", rows)))


def test_a_question_without_reference_is_named(questions, tmp_path):
    path = str(write_lines(tmp_path / "r.jsonl", [answer_row(11, ["a", "b"])]))
    with pytest.raises(ValueError, match=r"r.jsonl has no reference to both turns of 12, 31, 32"):
        add_references(questions, path)


def of(questions, category):
    return next(one for one in questions if one.category == category)


@pytest.mark.parametrize("category", ["writing", "coding"])
def test_places_are_filled_and_braces_in_texts_stay(prompts, questions, category):
    question = of(questions, category)
    first, second = (render(prompts, question, ANSWERS, turn, "judge") for turn in (1, 2))
    kind = "single-math-v1" if category == "coding" else "single-v1"
    assert (first.prompt_name, second.prompt_name) == (kind, f"{kind}-multi-turn")
    for turn in (first, second):
        assert turn.system == PROMPTS[turn.prompt_name][0]
    assert question.turns[0] in first.user
    assert "first {answer}" in first.user
    assert question.turns[1] not in first.user
    assert all(text in second.user for text in (*question.turns, *ANSWERS))
    has_reference = category == "coding"
    assert ("reference one" in first.user) == ("reference one" in second.user) == has_reference
    assert ("reference two" in second.user) == has_reference
    assert "reference two" not in first.user


def test_another_judge_prompt_or_answer_is_another_key(prompts, questions):
    keys = {
        render(prompts, questions[0], answers, turn, judge).key
        for answers in (ANSWERS, ("other", "second"))
        for turn in (1, 2)
        for judge in ("a", "b")
    }
    assert len(keys) == 8


@pytest.mark.parametrize("change", [{"name": "other"}, {"output_format": "[[A]]"}])
def test_prompts_that_are_not_fastchats_are_refused(tmp_path, change):
    rows = prompt_rows()
    rows[0] |= change
    with pytest.raises(ValueError, match=r"has no prompt 'single-v1' for a \[\[rating\]\]; add"):
        read_prompts(write_lines(tmp_path / "p.jsonl", rows))
