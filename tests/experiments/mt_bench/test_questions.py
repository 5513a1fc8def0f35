"""Questions, references and prompts: what is read, what is refused."""

import itertools

import pytest

from experiments.mt_bench import questions as mt
from tests.experiments.mt_bench.conftest import (
    PROMPTS,
    answer_row,
    prompt_rows,
    question_rows,
    write_lines,
)

ANSWERS = ("first {answer}", "second")


def test_names_of_hub_data_sets_are_understood(tmp_path):
    row = {"prompt_id": 7, "category": "stem", "prompt": ["a", "b"], "reference": []}
    path = write_lines(tmp_path / "q.jsonl", [row])
    assert mt.read_questions(str(path)) == [mt.Question(id=7, category="stem", turns=("a", "b"))]


def test_questions_have_a_reference_to_both_turns(questions, tmp_path):
    rows = question_rows(("math",), 3)
    for row, reference in zip(rows, (["one", "two"], ["one", ""], ["one"]), strict=True):
        row["reference"] = reference
    read = mt.read_questions(str(write_lines(tmp_path / "q.jsonl", rows)))
    assert [one.reference for one in read] == [("one", "two"), None, None]
    assert mt.add_references(read[:1], None) == read[:1]
    with pytest.raises(ValueError, match=r"questions has no reference to both turns of 2, 3, wh"):
        mt.add_references(read, None)
    path = str(write_lines(tmp_path / "r.jsonl", [answer_row(11, "a", "b")]))
    with pytest.raises(ValueError, match=r"r.jsonl has no reference to both turns of 12, 31, 32"):
        mt.add_references(questions, path)


@pytest.mark.parametrize(
    "change",
    [
        {"category": "maths"},
        {"turns": ["one"]},
        {"turns": ["one", " "]},
        {"question_id": None},
        {"question_id": 1},
    ],
)
def test_damaged_questions_are_refused(tmp_path, change):
    rows = question_rows(("math",), 2)
    rows[1] |= change
    with pytest.raises(ValueError, match=r"row 2: .* needs a `question_id` of its own, as `turns`"):
        mt.read_questions(str(write_lines(tmp_path / "q.jsonl", rows)))


@pytest.mark.parametrize("category", ["writing", "coding"])
def test_places_are_filled_and_braces_in_texts_stay(prompts, questions, category):
    question = next(one for one in questions if one.category == category)
    first, second = (mt.render(prompts, question, ANSWERS, turn, "judge") for turn in (1, 2))
    kind = "single-math-v1" if category == "coding" else "single-v1"
    assert (first.prompt_name, second.prompt_name) == (kind, f"{kind}-multi-turn")
    for turn in (first, second):
        assert turn.system == PROMPTS[turn.prompt_name][0]
    references = ("reference one", "reference two")
    texts = (*question.turns, *ANSWERS, *references)
    is_coding = category == "coding"
    # The second turn shows both, the first its own.
    assert [text in first.user for text in texts] == [True, False, True, False, is_coding, False]
    assert [text in second.user for text in texts] == [True] * 4 + [is_coding] * 2


def test_another_judge_prompt_or_answer_is_another_key(prompts, questions):
    cases = itertools.product((ANSWERS, ("other", "second")), (1, 2), ("a", "b"))
    assert len({mt.render(prompts, questions[0], *case).key for case in cases}) == 8


@pytest.mark.parametrize("change", [{"name": "other"}, {"output_format": "[[A]]"}])
def test_prompts_that_are_not_fastchats_are_refused(tmp_path, change):
    rows = prompt_rows()
    rows[0] |= change
    with pytest.raises(ValueError, match=r"has no prompt 'single-v1' for a \[\[rating\]\]; add"):
        mt.read_prompts(write_lines(tmp_path / "p.jsonl", rows))
