"""Rows of tools and calls: what the chat template does not show is refused, never left out."""

import copy
import json
from pathlib import Path

import pytest
import trl

from pacatune.data.encode import Encoder
from pacatune.data.formats import to_examples
from pacatune.data.read import Row
from tests.data.test_encode import MARKED_TEMPLATE, learned_text

# SmolLM2's: made before models called tools.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are SmolLM.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROLES_APART = (  # Of turns with another role nothing is written.
    "{% for m in messages %}{% if m['role'] in ['user', 'assistant'] %}<|{{ m['role'] }}|>"
    "{{ m['content'].split('</think>')[-1] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name."}},
                "required": ["city"],
            },
        },
    }
]


def call(arguments):
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": "call00001", "type": "function", "function": function}


def chat(arguments, **assistant):
    return [
        {"role": "user", "content": "Is it warm in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [call(arguments)], **assistant},
        {"role": "tool", "content": "21", "name": "get_weather", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "Yes, 21 degrees."},
    ]


CALLED = chat({"city": "Paris"})
PLAIN = [CALLED[0], {"role": "assistant", "content": "Yes."}]


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return copy.deepcopy(tiny_tokenizer)


def encode(tokenizer, template, messages, tools=None, **options):
    tokenizer.chat_template = template
    row = Row("f, row 1", {"messages": messages, "tools": tools})
    (example,) = to_examples([row], "auto", has_template=True)
    return Encoder(tokenizer, {tokenizer.eos_token_id}, **options)(example)


def template(name):
    return (TEMPLATES / f"{name}.jinja").read_text()


@pytest.mark.parametrize(
    ("messages", "tools", "hidden"),
    [
        (CALLED, TOOLS, "tool_calls of turn 2"),
        (CALLED, None, "tool_calls of turn 2"),
        (PLAIN, TOOLS, r"tools\[0\]"),
        (
            [PLAIN[0], {**PLAIN[1], "function_call": {"name": "f", "arguments": "{}"}}],
            None,
            "function_call of turn 2",
        ),
        ([PLAIN[0], {**PLAIN[1], "reasoning_content": "It is summer."}], None, "reasoning_content"),
    ],
)
def test_template_without_tools_refuses_rows_with_them(tokenizer, messages, tools, hidden):
    rule = rf"f, row 1: the chat template does not show {hidden}.*`data.chat_template`"
    with pytest.raises(ValueError, match=rule):
        encode(tokenizer, CHATML, messages, tools)


@pytest.mark.parametrize("role", ["tool", "system", "developer"])
def test_turns_of_roles_that_the_template_drops(tokenizer, role):
    messages = [*PLAIN, {"role": role, "content": "Yes."}, *PLAIN]
    with pytest.raises(ValueError, match=r"does not show content of turn 3 \(role"):
        encode(tokenizer, ROLES_APART, messages)


def test_answers_of_which_the_template_drops_a_part(tokenizer):
    thought = {"role": "assistant", "content": "<think>\nIt is summer.\n</think>\n\nYes."}
    with pytest.raises(ValueError, match="does not show all of the content of turn 2"):
        encode(tokenizer, ROLES_APART, [PLAIN[0], thought])
    # Where nothing is learned from it, the template decides what a model sees of its past.
    encode(tokenizer, ROLES_APART, [PLAIN[0], {**thought, "weight": 0}, *PLAIN])


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, json.dumps({"city": "Paris"})])
@pytest.mark.parametrize(
    "name",
    ["qwen2_5", "qwen3", "qwen3_5_think", "llama3_1", "deepseekv3", "glm4moe", "lfm2_v2", "gptoss"],
)
def test_templates_with_tools_show_them(tokenizer, name, arguments):
    """Arguments are written as JSON once, whether the row has them as an object or as a text."""
    tools = None if name == "deepseekv3" else TOOLS  # It shows calls alone.
    encoded = encode(tokenizer, template(name), chat(arguments), tools)
    assert ("Weather of a city." in tokenizer.decode(encoded.input_ids)) == bool(tools)
    learned = learned_text(tokenizer, encoded)
    assert "get_weather" in learned
    assert "Paris" in learned
    assert '\\"' not in learned
    assert "Yes, 21 degrees." in learned


def test_template_that_takes_arguments_as_text(tokenizer):
    """The text is the only form that such a template can render; objects become one."""
    original = template("deepseekv3").replace("{%- for message", "{%- for  message", 1)
    for arguments in ({"city": "Paris"}, '{"city": "Paris"}'):
        messages = [CALLED[0], *chat(arguments)[1:2]]
        encoded = encode(tokenizer, original.replace("is none", "== ''"), messages)
        assert '{"city": "Paris"}' in learned_text(tokenizer, encoded)


def test_short_values_are_not_mistaken_for_others(tokenizer):
    """`21` stands in the answer, but the tool's turn is dropped."""
    with pytest.raises(ValueError, match=r"does not show content of turn 3 \(role 'tool'\)"):
        encode(tokenizer, ROLES_APART, [*PLAIN, CALLED[2], CALLED[3]])


@pytest.mark.parametrize("marked", [False, True])
def test_turns_of_weight_0_are_not_learned(tokenizer, marked):
    plain = tokenizer.chat_template
    messages = [
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "No.", "weight": 0},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "It is so.", "weight": 1},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Maybe.", "weight": 0},
    ]
    encoded = encode(tokenizer, MARKED_TEMPLATE if marked else plain, messages)
    assert "weight" not in tokenizer.decode(encoded.input_ids)
    assert learned_text(tokenizer, encoded) == "|It is so.</s>"


def test_weight_0_of_an_opening_turn(tokenizer):
    messages = [{"role": "assistant", "content": "Hello.", "weight": 0}, *PLAIN]
    plain = tokenizer.chat_template
    for chosen in (plain, MARKED_TEMPLATE):
        assert learned_text(tokenizer, encode(tokenizer, chosen, messages)) == "|Yes.</s>"


def test_weight_0_cannot_be_kept_where_all_is_learned(tokenizer):
    messages = [*PLAIN, PLAIN[0], {**PLAIN[1], "weight": 0}]
    with pytest.raises(ValueError, match=r"turn 4 has weight 0, and `data\.loss` 'all' learns"):
        encode(tokenizer, CHATML, messages, learn_all=True)


def test_other_fields_that_are_not_shown_are_told(tokenizer):
    messages = [{**PLAIN[0], "name": "Ann", "id": 3}, {**PLAIN[1], "rating": 5}]
    assert encode(tokenizer, CHATML, messages).hidden == ["name", "rating"]
    assert encode(tokenizer, template("qwen2_5"), CALLED, TOOLS).hidden == []


def test_template_that_refuses_the_marks_is_checked_by_the_text(tokenizer):
    strict = CHATML.replace(
        "{% for message in messages %}",
        "{% for message in messages %}{% if '.' not in message['content'] "
        "and '?' not in message['content'] %}{{ raise_exception('no sentence') }}{% endif %}",
    )
    assert learned_text(tokenizer, encode(tokenizer, strict, PLAIN)).startswith("|Yes.")
    with pytest.raises(ValueError, match="does not show reasoning_content of turn 2"):
        encode(tokenizer, strict, [PLAIN[0], {**PLAIN[1], "reasoning_content": "Summer."}])


def test_only_the_arguments_of_a_call_are_read_from_a_table(tmp_path):
    """A table fills each object with the fields of all others; a null there is no argument."""
    from datasets import Dataset

    from pacatune.data.read import read_rows

    rows = [{"messages": chat({"city": "Paris"})}, {"messages": chat({"country": "France"})}]
    path = tmp_path / "calls.parquet"
    Dataset.from_list(rows).to_parquet(path)
    found = [row.values["messages"][1]["tool_calls"] for row in read_rows(str(path))]
    assert found == [[call({"city": "Paris"})], [call({"country": "France"})]]
