"""Rows of each format, ShareGPT's among them, become the examples that they are."""

import json

import pytest

from pacatune.data.formats import Example, to_examples
from pacatune.data.read import Row
from tests.data.conftest import ASSISTANT, USER

CHAT, SYSTEM = [USER, ASSISTANT], {"role": "system", "content": "s"}
ASKING = {"instruction": "q"}
ASKED, ANSWERED = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
TEXT = {"type": "text", "text": "q"}
CALL = {"name": "add", "arguments": {"a": 1}}


def convert(*rows, format="auto", has_template=True):
    numbered = [Row(f"f.jsonl, row {i}", values) for i, values in enumerate(rows, start=1)]
    return list(to_examples(numbered, format, has_template=has_template))


@pytest.mark.parametrize(
    ("values", "prompt", "completion"),
    [
        ({"messages": CHAT}, [], CHAT),
        ({"conversations": CHAT}, [], CHAT),  # roles may have their own names
        ({"conversations": [ASKED, ANSWERED], "system": "s"}, [], [SYSTEM, *CHAT]),
        ({"prompt": "q", "completion": "a"}, "q", "a"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, [USER], [ASSISTANT]),
        (ASKING | {"input": None, "output": "a"}, [USER], [ASSISTANT]),
        # Empty columns that a format does not use.
        (ASKING | {"output": "a", "system": "", "history": []}, [USER], [ASSISTANT]),
        (ASKING | {"output": "a", "text": "t"}, [USER], [ASSISTANT]),  # more specific
        (ASKING | {"input": "1", "output": "a"}, [{**USER, "content": "q\n\n1"}], [ASSISTANT]),
        ({"text": "t", "messages": None}, "", "t"),  # as tables fill what a row lacks
        (  # parts are lines; a table of such rows fills in the fields of other parts
            {"messages": [{**USER, "content": [{**TEXT, "image_url": None}, TEXT]}, ASSISTANT]},
            [],
            [{"role": "user", "content": "q\nq"}, ASSISTANT],
        ),
    ],
)
def test_formats_are_detected(values, prompt, completion):
    assert convert(values) == [Example("f.jsonl, row 1", prompt, completion)]


def test_a_format_that_is_given():
    (example,) = convert({"instruction": "q", "output": "a", "text": "t"}, format="text")
    assert example.completion == "t"


@pytest.mark.parametrize(("given", "shown"), [({"input": "1"}, "### Input:\n1\n\n"), ({}, "")])
def test_instruction_without_template_becomes_text(given, shown):
    (example,) = convert({"instruction": "Add {x}.", "output": "3", **given}, has_template=False)
    assert example.prompt == f"### Instruction:\nAdd {{x}}.\n\n{shown}### Response:\n"
    assert example.completion == "3"


def test_tools_calls_and_other_fields_are_kept():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    for tools, kept in ([{"name": "f"}], [{"name": "f"}]), ('[{"name": "f"}]', [{"name": "f"}]):
        (example,) = convert({"messages": [{**USER, "name": None}, call], "tools": tools})
        assert (example.completion, example.tools) == ([USER, {**call, "content": ""}], kept)
    assert convert({"messages": CHAT, "tools": " "})[0].tools is None
    turns = [
        ASKED,
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "2"},
        {"from": "function_call", "value": json.dumps([CALL, CALL])},
    ]
    (example,) = convert({"conversations": turns, "tools": json.dumps([CALL])})
    assert (example.tools, example.learned_turns) == ([CALL], [1, 3])
    calls = [{"type": "function", "function": CALL}]
    called = {"role": "assistant", "content": "", "tool_calls": calls}
    result = {"role": "tool", "content": "2"}
    assert example.messages == [USER, called, result, {**called, "tool_calls": 2 * calls}]


@pytest.mark.parametrize("flag", ["weight", "train", "training", "loss"])
def test_weights_are_turns_not_to_learn(flag):
    turns = [USER, {**ASSISTANT, flag: False}, {**USER, flag: 0}, {**ASSISTANT, flag: 1.0}]
    (example,) = convert({"messages": turns})
    assert (example.completion, example.skipped) == (2 * CHAT, [1, 2])
    assert example.learned_turns == [3]
    (example,) = convert({"prompt": [{**USER, flag: None}], "completion": turns[1:]})
    assert (example.prompt, example.skipped) == ([USER], [1, 2])
    (example,) = convert({"conversations": [ASKED, {**ANSWERED, flag: 0}, ASKED, ANSWERED]})
    assert example.learned_turns == [3]


@pytest.mark.parametrize("role", ["system", "developer", "tool", "function", "ipython"])
def test_roles_of_chat_templates(role):
    turn = {"role": role, "content": "c"}
    (example,) = convert({"messages": [USER, turn, ASSISTANT]})
    assert (example.completion[1], example.learned_turns) == (turn, [2])


def answering(**changes):
    return {"messages": [USER, {**ASSISTANT, **changes}]}


def instructing(**values):
    return {"instruction": "q", "output": "a", **values}


def sharing(**turn):
    return {"conversations": [ASKED, turn]}


def showing(*images, **columns):
    parts = [{"type": "image", "image": one} for one in images]
    return {"messages": [{**USER, "content": parts}, ASSISTANT], **columns}


def templated(values):
    return {"messages": CHAT, "chat_template_kwargs": values}


QA = {"messages": None, "prompt": "q", "completion": "a"}
MARKED = {"messages": [{**USER, "content": "<image>q"}, ASSISTANT]}
ROLE = {"role": "assistnt", "content": "a"}
ACCEPTED = r"are not those; .* Accepted are messages \| conversations \| prompt, completion \| "
ROLES = "roles are system, developer, user, assistant, tool, function, ipython, environment"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"question": "q", "answer": "a"}, r"the columns \['answer', 'question'\] " + ACCEPTED),
        ({"prompt": "q", "completion": " "}, "'completion' is ' '; it must be a text. Fill it"),
        ({"prompt": [USER], "completion": "a"}, "'prompt' .* and 'completion' .* both be texts or"),
        ({"prompt": [USER], "completion": [USER]}, "'completion' has no assistant turn"),
        ({"prompt": [USER], "completion": [ROLE]}, rf"completion\[0\]: .* 'assistant'\? {ROLES}"),
        ({"messages": "hi"}, "'messages' is 'hi'; it must be a list of messages, as {"),
        ({"messages": [USER]}, "'messages' has no assistant turn, or none of weight 1, so nothing"),
        ({"messages": ["hi"]}, r"messages\[0\]: 'hi' is no object with the strings 'role' and"),
        (answering(content=[TEXT, {"type": "audio"}]), r"messages\[1\]: a part is 'audio'; give"),
        (answering(loss_scale=0.5), r"messages\[1\]: 'loss_scale' is not read: a turn is learned"),
        (answering(weight=0.5), r"messages\[1\]: the weight is 0.5; it must be 0 or 1, and 1 is"),
        (answering(train=True, weight=0), r"messages\[1\]: the weight is 0; it must be 0 or 1"),
        ({"messages": [{**USER, "weight": 1}, ASSISTANT]}, r"messages\[0\]: the weight is 1;"),
        ({"messages": CHAT, "tools": "f"}, "'tools' is 'f'; it must be JSON"),
        ({"messages": CHAT, "tools": 1}, "'tools' is 1; it must be a list of functions"),
        (answering(tool_calls=1), r"messages\[1\]: 'tool_calls' is 1; it must be a list of calls"),
        ({"messages": CHAT, "functions": ["f"]}, "'functions' is not .*write it into .*`tools`"),
        (instructing(system="Be kind."), "column 'system' is not used by format 'instruction'"),
        ({"prompt": "q", "completion": "a", "tools": ["f"]}, "'tools' is not used by format 'prom"),
        (sharing(**{"from": "humen", "value": "a"}), r"conversations\[1\]: .* did you mean 'user'"),
        (sharing(**{"from": "bot", "value": "a"}), rf"\[1\]: the role is 'bot'; {ROLES}"),
        (sharing(**{"from": "function_call", "value": "add(1)"}), r"'value' is 'add\(1\)'; it mu"),
        (templated(3), "'chat_template_kwargs' is 3; it must be an object, as {\"enable_thin"),
        (templated("x"), "'chat_template_kwargs' is 'x'; it must be JSON"),
        (templated({"tools": []}), "'chat_template_kwargs' sets 'tools', which is no variable of"),
        (templated({"a b": 1}), "'chat_template_kwargs' sets 'a b', which is no variable of a"),
        (templated({"x": 1}) | QA, "'chat_template_kwargs' is not used by format 'prompt-comple"),
        (showing("no.png"), "the image is 'no.png', which is no file here"),
        (showing("http://a/b.png"), "nothing is fetched while data is read: give its path"),
        (showing(3), "the image is 3; give a path or a data URI"),
        (showing(None, images=[]), "more images are shown than the column 'images' has; add them"),
        (MARKED | {"images": [__file__] * 2}, "'images' has more than the messages show as <imag"),
        (answering(content=[{"type": "image", "image": __file__}]), "an answer has an image, and"),
    ],
)
def test_bad_rows(values, message):
    with pytest.raises(ValueError, match=f"f.jsonl, row 1: .*{message}"):
        convert(values)


def test_mixed_formats():
    rule = r"row 2: the columns \['prompt'\] are not those of format 'messages'"
    with pytest.raises(ValueError, match=rule):
        convert({"messages": CHAT}, {"prompt": "q", "completion": None})
