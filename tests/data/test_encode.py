"""Which tokens of a text or chat are learned, and what a chat template must show."""

import json
from pathlib import Path

import pytest
import trl

from pacatune.data.encode import Encoder, with_defaults
from pacatune.data.formats import Example, to_examples
from pacatune.data.read import Row, read_rows
from tests.conftest import CHAT_TEMPLATE
from tests.data.conftest import chat

MARKED_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Like Qwen3's: reasoning of earlier turns disappears when more turns follow.
REWRITING_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% if message.role == 'assistant' and loop.last %}(thinks) {% endif %}{{ message.content }}",
)
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
CITY = {"type": "string", "description": "Its name."}
PARAMETERS = {"type": "object", "properties": {"city": CITY}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "Weather of a city.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": WEATHER}]


def call(arguments):
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": "call00001", "type": "function", "function": function}


def calling(arguments):
    return [
        {"role": "user", "content": "Is it warm in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [call(arguments)]},
        {"role": "tool", "content": "21", "name": "get_weather", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "Yes, 21 degrees."},
    ]


CALLED = calling({"city": "Paris"})
PLAIN = [CALLED[0], {"role": "assistant", "content": "Yes."}]


def answered(**more):
    return [PLAIN[0], {**PLAIN[1], **more}]


def encode(tokenizer, prompt, completion, **options):
    encoder = Encoder(tokenizer=tokenizer, stop_ids={tokenizer.eos_token_id}, **options)
    return encoder(Example("f, row 1", prompt, completion))


def encode_row(tokenizer, template, messages, tools=None, **options):
    tokenizer.chat_template = template
    row = Row("f, row 1", {"messages": messages, "tools": tools})
    (example,) = to_examples([row], "auto", has_template=True)
    return Encoder(tokenizer=tokenizer, stop_ids={tokenizer.eos_token_id}, **options)(example)


def learned_text(tokenizer, encoded):
    """Learned runs, decoded, between bars."""
    text, before = "", False
    for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True):
        learned = label != -100
        text += "|" * (learned != before) + (tokenizer.decode([token]) if learned else "")
        before = learned
    return text.rstrip("|")


def test_both_ways_to_find_the_turns_of_a_chat(tokenizer):
    """Every assistant turn of the completion is learned with its stop token, nothing else is."""
    messages = chat("Hi?", "It is so.", "And?", "No.")
    system, tool = {"role": "system", "content": "Be kind."}, {"role": "tool", "content": "4"}
    chats = {
        "|It is so.</s>||No.</s>": ([], messages),
        "|No.</s>": (messages[:3], messages[3:]),
        "|It is so.</s>": ([], [system, messages[0], tool, messages[1], tool]),
    }
    found = []
    for tokenizer.chat_template in (CHAT_TEMPLATE, MARKED_TEMPLATE):
        found.append([encode(tokenizer, *parts) for parts in chats.values()])
        for text, parts, encoded in zip(chats, chats.values(), found[-1], strict=True):
            whole = tokenizer.apply_chat_template([*parts[0], *parts[1]])
            assert encoded["input_ids"] == whole["input_ids"]
            assert learned_text(tokenizer, encoded) == text
            assert "moved" not in encoded["notes"]
    assert found[0] == found[1]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE])
def test_turns_of_weight_0_are_not_learned(tokenizer, template):
    messages = chat("Hi?", "No.", "And?", "It is so.", "And?", "Maybe.")
    for turn, weight in ((1, 0), (3, 1), (5, 0)):
        messages[turn]["weight"] = weight
    encoded = encode_row(tokenizer, template, messages)
    assert "weight" not in tokenizer.decode(encoded["input_ids"])
    assert learned_text(tokenizer, encoded) == "|It is so.</s>"
    opening = [{"role": "assistant", "content": "Hello.", "weight": 0}, *PLAIN]
    assert learned_text(tokenizer, encode_row(tokenizer, template, opening)) == "|Yes.</s>"


def test_cue_that_the_answer_drops(tokenizer):
    """A generation prompt with an opened block, as of reasoning models."""
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "<|assistant|>\n{% endif %}", "<|assistant|>\n(thinks){% endif %}"
    )
    encoded = encode(tokenizer, [], chat("Hi?", "Yes."))
    assert learned_text(tokenizer, encoded) == "|Yes.</s>"
    assert "moved" in encoded["notes"]


ADDED = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>")


@pytest.mark.parametrize(
    ("name", "stop", "thoughts"),
    [
        ("qwen2_5", "<|im_end|>", ("", "")),
        ("gemma3", "<end_of_turn>", ("", "")),
        ("qwen3", "<|im_end|>", ("", "<think>\n\n</think>\n\n")),
        # Its generation prompt opens the thought.
        ("qwen3_5_think", "<|im_end|>", ("", "\n</think>\n\n")),
        ("qwen3_5_nothink", "<|im_end|>", ("", "")),
    ],
)
def test_of_known_templates_what_the_model_writes_is_learned(tokenizer, name, stop, thoughts):
    """TRL's marks cover more: line breaks around an answer, and empty thoughts in the history."""
    tokenizer.add_tokens([*ADDED], special_tokens=True)
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    messages = chat("Hi?", "It is so.", "And?", "No.")
    encoder = Encoder(tokenizer=tokenizer, stop_ids={tokenizer.convert_tokens_to_ids(stop)})
    encoded = encoder(Example("f, row 1", [], messages))
    first, last = thoughts
    assert learned_text(tokenizer, encoded) == f"|{first}It is so.{stop}||{last}No.{stop}"
    assert encoded["notes"] == []


def test_a_thought_that_the_data_has_is_learned(tokenizer):
    tokenizer.add_tokens([*ADDED], special_tokens=True)
    messages = chat("Hi?", "<think>\nHm.\n</think>\n\nYes.", "And?", "No.")
    encoded = encode_row(tokenizer, (TEMPLATES / "qwen3.jinja").read_text(), messages)
    assert "<think>\nHm.\n</think>\n\nYes." in learned_text(tokenizer, encoded)


@pytest.mark.parametrize("adds_stop", [False, True])
def test_texts_end_and_their_prompts_are_not_learned(tokenizer, adds_stop):
    if adds_stop:  # as some tokenizers do by themselves
        from tokenizers.processors import TemplateProcessing

        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    encoded = encode(tokenizer, "", "It is so.")
    assert tokenizer.decode(encoded["input_ids"]) == "<s>It is so.</s>"
    assert encoded["labels"] == encoded["input_ids"]
    assert encode(tokenizer, "", "It is so.</s>") == encoded
    encoded = encode(tokenizer, "Hi?", " It is so.")
    assert tokenizer.decode(encoded["input_ids"]) == "<s>Hi? It is so.</s>"
    assert learned_text(tokenizer, encoded) == "| It is so.</s>"
    assert "moved" not in encoded["notes"]
    # ` is` is one token, so a prompt that ends in a space is not seen as such.
    encoded = encode(tokenizer, "It ", "is so.")
    assert learned_text(tokenizer, encoded) == "| is so.</s>"
    assert "moved" in encoded["notes"]


@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3_5_think", "llama3_1", "glm4moe", "lfm2_v2", "gptoss"]
)
def test_templates_with_tools_show_them(tokenizer, name):
    """Arguments are written as JSON once, whether the row has them as an object or as a text."""
    template = (TEMPLATES / f"{name}.jinja").read_text()
    for arguments in ({"city": "Paris"}, json.dumps({"city": "Paris"})):
        encoded = encode_row(tokenizer, template, calling(arguments), TOOLS)
        assert "Weather of a city." in tokenizer.decode(encoded["input_ids"])
        learned = learned_text(tokenizer, encoded)
        assert all(word in learned for word in ("get_weather", "Paris", "Yes, 21 degrees."))
        assert '\\"' not in learned


def test_only_the_arguments_of_a_call_are_read_from_a_table(tmp_path):
    """A table fills each object with the fields of all others; a null there is no argument."""
    from datasets import Dataset

    given = [{"city": "Paris"}, {"country": "France"}]
    path = str(tmp_path / "calls.parquet")
    Dataset.from_list([{"messages": calling(one)} for one in given]).to_parquet(path)
    found = [row.values["messages"][1]["tool_calls"] for row in read_rows(path)]
    assert found == [[call(one)] for one in given]


THOUGHT = answered(content="<think>\nIt is summer.\n</think>\n\nYes.")
FUNCTION_CALL = {"name": "f", "arguments": "{}"}
TOOL = {"role": "tool", "content": "Yes."}
UNNAMED = r"'tools' or a call has .*; each must be an object with a name"
HIDDEN = r"the chat template does not show {}.*`data\.chat_template`"
REWRITTEN = r"renders turn 2 otherwise .*\{% generation %\} marks, or train on single answers"
WEIGHTS = r"has turns of weight 0, and `data\.loss` 'all' learns all; drop one"


# The name of the function stands in the question, too.
ASKING = {"role": "user", "content": "Please search for cats in Paris."}
SEARCH = {"type": "function", "function": {"name": "search", "description": "Find."}}
SEARCHING = [
    ASKING,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "search", "arguments": {"q": "cats"}}}
        ],
    },
]
NAMES_ALONE = (
    "{% for m in messages %}{{ m['role'] + m['content'] }}{% for c in m['tool_calls'] or [] %}"
    "{{ c['function']['name'] }}{% endfor %}{{ eos_token }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "messages", "options", "message"),
    [
        (CHATML, answered(function_call=FUNCTION_CALL), {}, HIDDEN.format("tool_calls")),
        (CHATML, SEARCHING, {}, HIDDEN.format("tool_calls")),
        (CHATML, [ASKING, PLAIN[1]], {"tools": [SEARCH]}, HIDDEN.format("tools")),
        (NAMES_ALONE, SEARCHING, {}, HIDDEN.format("the arguments of tool_calls")),
        (CHATML, answered(reasoning_content="Hm."), {}, HIDDEN.format("reasoning_content of turn")),
        (CHATML, PLAIN, {"tools": [{"type": "function"}]}, UNNAMED),
        (CHATML, answered(tool_calls=[3]), {}, UNNAMED),
        (CHATML, [*PLAIN, *answered(weight=0)], {"learn_all": True}, WEIGHTS),
        (ROLES_APART, THOUGHT, {}, HIDDEN.format("content of turn 2")),
        (ROLES_APART, [*PLAIN, TOOL, *PLAIN], {}, HIDDEN.format("content of turn 3 .role 'tool'")),
        (REWRITING_TEMPLATE, [*PLAIN, *PLAIN], {}, REWRITTEN),
        (CHAT_TEMPLATE, PLAIN[::-1], {}, "the chat opens with an assistant turn, which .*; put a"),
        ("{{ raise_exception('no') }}", PLAIN, {}, r"chat template cannot render it \(no\); give"),
    ],
)
def test_chats_that_are_refused(tokenizer, template, messages, options, message):
    with pytest.raises(ValueError, match=f"f, row 1: .*{message}"):
        encode_row(tokenizer, template, messages, **options)


def test_what_a_template_may_drop(tokenizer):
    learned = learned_text(tokenizer, encode_row(tokenizer, REWRITING_TEMPLATE, PLAIN))
    assert learned == "|(thinks) Yes.</s>"
    # Where nothing is learned from a turn, the template decides what a model sees of its past.
    past = [THOUGHT[0], {**THOUGHT[1], "weight": 0}]
    assert learned_text(tokenizer, encode_row(tokenizer, ROLES_APART, [*past, *PLAIN]))


MODES = "{{ 'slow' if enable_thinking else 'fast' }}{{ more }}"
MODES = CHAT_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}" + MODES)


@pytest.mark.parametrize("is_text", [False, True])
def test_a_row_sets_variables_of_the_template(tokenizer, is_text):
    """As TRL does it; tables may keep them as JSON."""
    tokenizer.chat_template = MODES
    encoder = Encoder(tokenizer=tokenizer, stop_ids={2})
    for options in ({"enable_thinking": True, "more": "!"}, {"enable_thinking": False}, None):
        column = json.dumps(options) if is_text else options
        (example,) = to_examples([Row("f", {"messages": PLAIN, "chat_template_kwargs": column})])
        expected = tokenizer.apply_chat_template(PLAIN, **(options or {}), return_dict=True)
        assert encoder(example)["input_ids"] == expected["input_ids"]
        assert encoder(example)["notes"] == []


@pytest.mark.parametrize("thinks", [True, False])
def test_an_empty_thought_is_learned_where_the_prompt_does_not_give_it(tokenizer, thinks):
    template = (TEMPLATES / "qwen3.jinja").read_text()
    tokenizer.chat_template = template
    values = {"prompt": PLAIN[:1], "completion": PLAIN[1:]}
    for rows, default in (({"enable_thinking": thinks}, template), ({}, None)):
        default = default or with_defaults(template, {"enable_thinking": thinks})
        tokenizer.chat_template = default
        (example,) = to_examples([Row("f", {**values, "chat_template_kwargs": rows})])
        learned = learned_text(tokenizer, Encoder(tokenizer=tokenizer, stop_ids={2})(example))
        assert learned.startswith("|<think>" if thinks else "|Yes.")


def test_variables_that_the_run_sets_are_defaults(tokenizer):
    tokenizer.chat_template = MODES
    more = {"more": 'it\'s "é" {% %}\n', "enable_thinking": True, "n": None, "d": {"x": [1.5]}}
    expected = tokenizer.apply_chat_template(PLAIN, tokenize=False, **more)
    own = tokenizer.apply_chat_template(PLAIN, tokenize=False, more="", enable_thinking=False)
    assert expected.startswith("<s>slowit's")
    tokenizer.chat_template = with_defaults(MODES, more)
    assert tokenizer.apply_chat_template(PLAIN, tokenize=False) == expected
    tokenizer.chat_template = with_defaults(tokenizer.chat_template, {"enable_thinking": False})
    said = tokenizer.apply_chat_template(PLAIN, tokenize=False)
    assert said == expected.replace("slow", "fast")  # the newest wins
    values = {"messages": PLAIN, "chat_template_kwargs": {"more": ""}}
    (example,) = to_examples([Row("f", values)])
    ids = Encoder(tokenizer=tokenizer, stop_ids={2})(example)["input_ids"]
    assert tokenizer.decode(ids) == own


def test_a_known_template_is_known_with_defaults(tokenizer):
    """Without TRL's marks it would be refused, as it changes earlier turns."""
    template = (TEMPLATES / "qwen3.jinja").read_text()
    turns = chat("a", "<think>\nb\n</think>\n\nc", "d", "<think>\ne\n</think>\n\nf")
    plain = encode_row(tokenizer, template, turns)
    assert encode_row(tokenizer, with_defaults(template, {"enable_thinking": True}), turns) == plain


def test_a_variable_that_no_template_reads_is_said(tokenizer):
    (example,) = to_examples([Row("f", {"messages": PLAIN, "chat_template_kwargs": {"think": 1}})])
    assert Encoder(tokenizer=tokenizer, stop_ids={2})(example)["notes"] == ["unread"]
