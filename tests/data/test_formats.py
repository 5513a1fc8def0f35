import pytest

from pacatune.data.formats import Example, to_examples
from pacatune.data.read import Row

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
TEXT = {"type": "text", "text": "q"}


def convert(*rows, format="auto", has_template=True):
    numbered = [Row(f"f.jsonl, row {i}", values) for i, values in enumerate(rows, start=1)]
    return list(to_examples(numbered, format, has_template=has_template))


@pytest.mark.parametrize(
    ("values", "prompt", "completion"),
    [
        ({"messages": [USER, ASSISTANT]}, [], [USER, ASSISTANT]),
        ({"prompt": "q", "completion": "a"}, "q", "a"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, [USER], [ASSISTANT]),
        ({"instruction": "q", "output": "a"}, [USER], [ASSISTANT]),
        ({"instruction": "q", "input": "", "output": "a"}, [USER], [ASSISTANT]),
        ({"instruction": "q", "input": None, "output": "a"}, [USER], [ASSISTANT]),
        ({"text": "t"}, "", "t"),
    ],
)
def test_formats_are_detected(values, prompt, completion):
    assert convert(values) == [Example("f.jsonl, row 1", prompt, completion)]


def test_instruction_with_input_becomes_one_question():
    (example,) = convert({"instruction": "Add.", "input": "1 2", "output": "3"})
    assert example.prompt == [{"role": "user", "content": "Add.\n\n1 2"}]


def test_instruction_without_template_becomes_text():
    (example,) = convert(
        {"instruction": "Add {x}.", "input": "1", "output": "3"}, has_template=False
    )
    assert example.prompt == ("### Instruction:\nAdd {x}.\n\n### Input:\n1\n\n### Response:\n")
    assert example.completion == "3"
    (example,) = convert({"instruction": "Add.", "output": "3"}, has_template=False)
    assert example.prompt == "### Instruction:\nAdd.\n\n### Response:\n"


def test_nulls_of_tables_count_as_absent():
    (example,) = convert({"messages": None, "text": "t"})
    assert example.completion == "t"


def test_most_specific_format_wins_and_can_be_overridden():
    row = {"instruction": "q", "output": "a", "text": "t"}
    assert convert(row)[0].prompt == [USER]
    assert convert(row, format="text")[0].completion == "t"


def test_content_parts_are_lines():
    # A table of such rows fills in the fields of other parts.
    asked = {"role": "user", "content": [{**TEXT, "image_url": None}, {**TEXT, "text": "r"}]}
    (example,) = convert({"messages": [asked, ASSISTANT]})
    assert example.completion == [{"role": "user", "content": "q\nr"}, ASSISTANT]


def test_tools_and_other_message_fields_are_kept():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    (example,) = convert({"messages": [{**USER, "name": None}, call], "tools": [{"name": "f"}]})
    assert example.completion == [USER, {**call, "content": ""}]
    assert example.tools == [{"name": "f"}]


def test_weights_are_turns_not_to_learn():
    turns = [USER, {**ASSISTANT, "weight": 0}, {**USER, "weight": 0}, {**ASSISTANT, "weight": 1.0}]
    (example,) = convert({"messages": turns})
    assert example.completion == [USER, ASSISTANT, USER, ASSISTANT]
    assert example.skipped == [1, 2]
    assert example.learned_turns == [3]
    (example,) = convert({"prompt": [{**USER, "weight": None}], "completion": turns[1:]})
    assert (example.prompt, example.skipped) == ([USER], [1, 2])


@pytest.mark.parametrize("flag", ["train", "training", "loss"])
def test_flags_of_other_programs_are_weights(flag):
    turns = [USER, {**ASSISTANT, flag: False}, {**USER, flag: False}, {**ASSISTANT, flag: True}]
    (example,) = convert({"messages": turns})
    assert example.completion == [USER, ASSISTANT, USER, ASSISTANT]
    assert example.skipped == [1, 2]
    (example,) = convert({"messages": [USER, {**ASSISTANT, flag: None, "weight": 1}]})
    assert example.skipped == []


def test_tools_may_be_json():
    row = {"messages": [USER, ASSISTANT]}
    examples = convert(*({**row, "tools": text} for text in ('[{"name": "f"}]', " ")))
    assert [example.tools for example in examples] == [[{"name": "f"}], None]


def test_empty_columns_that_a_format_does_not_use():
    assert convert({"instruction": "q", "output": "a", "system": "", "history": []})


def test_unknown_columns_list_what_was_found_and_what_is_accepted():
    with pytest.raises(
        ValueError,
        match=r"row 1: the columns \['answer', 'question'\] are not those; .* Accepted are "
        r"messages \| conversations \| prompt, completion \| instruction, output",
    ):
        convert({"question": "q", "answer": "a"})


def test_mixed_formats():
    with pytest.raises(
        ValueError, match=r"row 2: the columns \['text'\] are not those of format 'messages'"
    ):
        convert({"messages": [USER, ASSISTANT]}, {"text": "t"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "q", "completion": None}, r"row 2: the columns \['prompt'\] are not those of"),
        (
            {"prompt": "q", "completion": " "},
            "row 2: 'completion' is ' '; it must be",
        ),
        ({"prompt": "", "completion": "a"}, "row 2: 'prompt' is ''; it must be a text"),
        ({"prompt": "q", "completion": 3}, "row 2: 'completion' is 3; it must be a text"),
        ({"prompt": [USER], "completion": "a"}, r"'completion' .* must both be texts or"),
        ({"prompt": [USER], "completion": [USER]}, "'completion' has no assistant turn"),
        (
            {"prompt": [], "completion": [ASSISTANT]},
            r"row 2: 'prompt' is \[\]; it must be",
        ),
    ],
)
def test_bad_prompt_completion_rows(values, message):
    with pytest.raises(ValueError, match=message):
        convert({"prompt": "q", "completion": "a"}, values)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "'messages' is 'hi'; it must be a list of messages"),
        ([], r"'messages' is \[\]; it must be a list of messages"),
        ([USER], "'messages' has no assistant turn, or none of weight 1, so n"),
        (["hi"], r"messages\[0\]: .hi. is no object with"),
        ([USER, {"content": "a"}], r"messages\[1\]: .*strings 'role' and 'content'"),
        ([USER, {"role": "assistant"}], r"messages\[1\]: the content is ''; it must be a text"),
        (
            [USER, {**ASSISTANT, "content": ["a"]}],
            r"messages\[1\]: a part is 'a'; give text",
        ),
        ([USER, {**ASSISTANT, "content": []}], r"messages\[1\]: the content is ''; it must be a"),
        (
            [{"role": "user", "content": [TEXT, {"type": "audio"}]}, ASSISTANT],
            r"messages\[0\]: a part is 'audio'; give text, image or",
        ),
        ([USER, {**ASSISTANT, "content": "\n"}], r"messages\[1\]: the content is '.n'; it must"),
    ],
)
def test_bad_messages(messages, message):
    with pytest.raises(ValueError, match=message):
        convert({"messages": messages})


@pytest.mark.parametrize(
    ("role", "meant"),
    [
        ("assistnt", "'assistant'"),
        ("Assistant", "'assistant'"),
        ("usr", "'user'"),
        ("human", "'user'"),
        ("gpt", "'assistant'"),
        ("function_call", "'assistant'"),
        ("observation", "'tool'"),
        ("xyzzy", None),
    ],
)
def test_unknown_roles(role, meant):
    known = "roles are system, developer, user, assistant, tool, function, ipython, environment"
    rule = f"the role is {role!r}; {f'did you mean {meant}[?] ' if meant else ''}{known}"
    turn = {"role": role, "content": "a"}
    for values, column in (
        ({"messages": [USER, ASSISTANT, turn]}, r"messages\[2\]"),
        ({"conversations": [USER, ASSISTANT, turn]}, r"conversations\[2\]"),
        ({"prompt": [turn], "completion": [ASSISTANT]}, r"prompt\[0\]"),
        ({"prompt": [USER], "completion": [turn, ASSISTANT]}, r"completion\[0\]"),
    ):
        with pytest.raises(ValueError, match=f"row 1: {column}: {rule}"):
            convert(values)


@pytest.mark.parametrize("role", ["system", "developer", "tool", "function", "ipython"])
def test_roles_of_chat_templates(role):
    turn = {"role": role, "content": "c"}
    (example,) = convert({"messages": [USER, turn, ASSISTANT]})
    assert (example.completion[1], example.learned_turns) == (turn, [2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"instruction": "q", "input": 3, "output": "a"}, "'input' is 3; it must be a text"),
        ({"instruction": "", "output": "a"}, "'instruction' is ''; it must be"),
        ({"instruction": "q", "output": ""}, "'output' is ''; it must be a text"),
        ({"messages": [USER, ASSISTANT], "tools": "f"}, "'tools' is 'f'; it must be JSON"),
        ({"text": ""}, "row 1: 'text' is ''; it must be"),
        (
            {"messages": [USER, {**ASSISTANT, "loss_scale": 0.5}]},
            r"messages\[1\]: .loss_scale. is not read: a turn is learned as a w",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "weight": 0.5}]},
            r"messages\[1\]: the weight is 0.5",
        ),
        (
            {"messages": [{**USER, "weight": 1}, ASSISTANT]},
            r"messages\[0\]: the weight is 1",
        ),
        (
            {"messages": [{**USER, "train": True}, ASSISTANT]},
            r"messages\[0\]: the weight is True",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "train": "no"}]},
            r"messages\[1\]: the weight is 'no'",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "weight": 0}]},
            "'messages' has no assistant turn, or none of weight 1, so nothing to learn",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "train": True, "weight": 0}]},
            r"messages\[1\]: the weight is 0; it must be",
        ),
        (
            {"messages": [USER, ASSISTANT], "functions": [{"name": "f"}]},
            "column 'functions' is not used by format 'messages'.*`tools`",
        ),
        (
            {"instruction": "q", "output": "a", "system": "Be kind."},
            "column 'system' is not used by format 'instruction'",
        ),
        (
            {"instruction": "q", "output": "a", "history": [["q", "a"]]},
            "column 'history' is not used by format 'instruction'",
        ),
        (
            {"prompt": "q", "completion": "a", "tools": [{"name": "f"}]},
            "column 'tools' is not used by format 'prompt-completion'",
        ),
    ],
)
def test_other_bad_rows(values, message):
    with pytest.raises(ValueError, match=message):
        convert(values)
