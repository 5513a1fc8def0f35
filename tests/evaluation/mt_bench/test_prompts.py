"""What the judge is shown."""

import pytest

from pacatune.evaluation.mt_bench.questions import read_prompts, render
from tests.evaluation.mt_bench.conftest import PROMPTS, prompt_rows, write_lines

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
