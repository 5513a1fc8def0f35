import pytest

from pacatune.data.choices import ChoiceQuestion, to_choice_question
from pacatune.data.read import Row

ROW = {"question": "Who?", "choices": ["Ann", " Bob "], "answer": 1}


def test_own_and_big_bench_rows_say_the_same():
    expected = ChoiceQuestion("Who?", ["Ann", "Bob"], 1)
    scores = {"input": "Who? ", "target_scores": {"Ann": 0, "Bob": 1}}
    for values in (ROW, {**ROW, "answer": "Bob"}, scores):
        assert to_choice_question(Row("here", values)) == expected
    assert expected.context() == "Question: Who?\nAnswer:"
    assert expected.context(chat=True) == "Who?"


def test_written_rows_are_read_again():
    one = ChoiceQuestion("Who?", ["Ann", "Bob"], 1, prompt="He is")
    assert one.row() == {
        "prompt": "He is",
        "completion": " Bob",
        "question": "Who?",
        "choices": ["Ann", "Bob"],
        "answer": 1,
    }
    assert to_choice_question(Row("here", one.row())) == one
    chat = one.row(chat=True)
    assert [message["content"] for message in chat["messages"]] == ["Who?", "Bob"]
    assert to_choice_question(Row("here", chat)).context(chat=True) == "Who?"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"choices": ["a", "b"], "answer": 0},
            r"columns \['answer', 'choices'\] lack 'question'; a row needs question, choices",
        ),
        ({**ROW, "question": ""}, "'question' is ''; it must be a text"),
        ({**ROW, "choices": ["a"]}, r"'choices' is \['a'\]; it must list two texts or more"),
        ({**ROW, "choices": ["a", " "]}, "'choices' is .*; it must list two texts or more"),
        ({**ROW, "choices": ["a", "a "]}, "two of the choices .* are the same; remove one"),
        (
            {**ROW, "answer": 2},
            "'answer' is 2; it must be one of the choices, or its number",
        ),
        ({**ROW, "answer": True}, "'answer' is True; it must be one of the choices"),
        ({**ROW, "prompt": 3}, "'prompt' is 3; it must be a text, or left out"),
        ({"input": "q", "target_scores": {"a": "1"}}, "'target_scores' is .*; it must give each"),
        ({"input": "q", "target_scores": {}}, "'target_scores' is {}; it must give each"),
        ({"input": "q", "target_scores": {"a": 1, "b": 1}}, "2 choices have the highest of"),
    ],
)
def test_wrong_rows(values, message):
    with pytest.raises(ValueError, match=f"x.jsonl, row 3: {message}"):
        to_choice_question(Row("x.jsonl, row 3", values))
