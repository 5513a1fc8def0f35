"""ShareGPT's rows become the chats that they are."""

import json

import pytest

from pacatune.data.formats import to_examples
from pacatune.data.read import Row

ASKED, ANSWERED = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"name": "add", "arguments": {"a": 1}}


def convert(format="auto", **values):
    (example,) = to_examples([Row("f.jsonl, row 1", values)], format, has_template=True)
    return example


@pytest.mark.parametrize("format", ["auto", "sharegpt"])
def test_turns_are_messages(format):
    assert convert(format, conversations=[ASKED, ANSWERED]).messages == [USER, ASSISTANT]


def test_roles_may_have_their_own_names():
    assert convert(conversations=[USER, ASSISTANT]).messages == [USER, ASSISTANT]


def test_a_column_of_the_system_comes_first():
    example = convert(conversations=[ASKED, ANSWERED], system="s")
    assert example.messages == [{"role": "system", "content": "s"}, USER, ASSISTANT]
    assert convert(conversations=[ASKED, ANSWERED], system="").messages == [USER, ASSISTANT]


def test_calls_results_and_tools():
    turns = [
        ASKED,
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "2"},
        ANSWERED,
    ]
    example = convert(conversations=turns, tools=json.dumps([{"name": "add"}]))
    assert example.tools == [{"name": "add"}]
    assert example.messages[1:3] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": CALL}],
        },
        {"role": "tool", "content": "2"},
    ]
    assert example.learned_turns == [1, 3]


def test_several_calls_of_one_turn():
    turn = {"from": "function_call", "value": json.dumps([CALL, CALL])}
    calls = convert(conversations=[ASKED, turn]).messages[1]["tool_calls"]
    assert [call["function"] for call in calls] == [CALL, CALL]


def test_weights_of_turns_are_kept():
    turns = [ASKED, {**ANSWERED, "weight": 0}, ASKED, ANSWERED]
    assert convert(conversations=turns).learned_turns == [3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"conversations": "hi"}, "'conversations' is 'hi'; it must be a list"),
        ({"conversations": [ASKED, {"from": "humen", "value": "a"}]}, "did you mean 'user'"),
        (
            {"conversations": [ASKED, {"from": "bot", "value": "a"}]},
            r"\[1\]: the role is 'bot'; roles are system",
        ),
        (
            {"conversations": [ASKED, {"from": ["gpt"], "value": "a"}]},
            r"\[1\]: the role is .*'gpt'",
        ),
        ({"conversations": [ASKED, {"from": "gpt"}]}, r"conversations\[1\]: the content is ''"),
        ({"conversations": [ASKED, {"from": "function_call", "value": "add(1)"}]}, "must be JSON"),
        ({"conversations": [ASKED, ANSWERED], "tools": "add"}, "'tools' is 'add'; it must be JSON"),
        (
            {"conversations": [ASKED, ANSWERED], "images": ["no.png"]},
            "the image is .no.png., which is",
        ),
        ({"conversations": [ASKED]}, "'conversations' has no assistant turn"),
    ],
)
def test_bad_rows(values, message):
    with pytest.raises(ValueError, match=f"f.jsonl, row 1: .*{message}"):
        convert(**values)
