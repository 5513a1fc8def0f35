"""The accepted formats: which one a row has, and each as one kind of example."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pacatune.data import chat_images, sharegpt
from pacatune.data.choices import to_question
from pacatune.data.read import Row
from pacatune.names import nearest

Message = dict[str, Any]

# Required columns, most specific first: a row that fits several is the first of them.
COLUMNS = {
    "messages": ("messages",),
    "sharegpt": (sharegpt.COLUMN,),
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
    "mmlu": ("question", "choices", "answer"),
}
_ACCEPTED = (
    "messages | conversations | prompt, completion | instruction, (input,) output | text | "
    "question, choices, answer"
)

# What chat templates know; the assistant's turns alone are learned.
_ROLES = (
    *("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment"),
)
# What other formats call them.
_MEANT = {**sharegpt.ROLES, **dict.fromkeys(("bot", "model", "ai", "chatgpt"), "assistant")}

# Columns of other programs that say something to the model.
_NOT_USED = ("system", "history", "functions", "images", "documents", "chat_template_kwargs")

# What other programs call the weight of a message: Axolotl, TRL and ms-swift.
_FLAGS = ("train", "training", "loss")
# What they say besides of parts of a message, or of degrees.
_FINER = ("train_detail", "training_detail", "loss_scale")

# For models without a chat template; the wording of Stanford Alpaca without its preamble.
_INSTRUCTION = "### Instruction:\n{instruction}\n\n### Response:\n"
_INSTRUCTION_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and what is to be learned after it: both texts, or both lists of messages.

    A text of its own has an empty prompt. A chat has an empty list: every assistant turn in
    `completion` is learned, the other turns are context.
    """

    place: str
    prompt: str | list[Message]
    completion: str | list[Message]
    tools: list[Any] | None = None
    skipped: list[int] = field(default_factory=list)
    """Turns of weight 0: not learned, whoever speaks."""

    @property
    def messages(self) -> list[Message]:
        """All turns of a chat."""
        assert isinstance(self.prompt, list)
        assert isinstance(self.completion, list)
        return self.prompt + self.completion

    @property
    def images(self) -> list[str]:
        """The images of a chat, as their references."""
        is_chat = isinstance(self.completion, list)
        return chat_images.references(self.messages) if is_chat else []

    @property
    def learned_turns(self) -> list[int]:
        """Numbers, from 0, of the turns that are learned."""
        return [
            turn
            for turn, message in enumerate(self.messages)
            if turn >= len(self.prompt)
            and message["role"] == "assistant"
            and turn not in self.skipped
        ]


def detect_format(row: Row) -> str:
    """Return the format that the columns of a row fit."""
    present = present_columns(row)
    if found := _formats_of(present):
        return found[0]
    hint = "Rename the columns."
    if "choices" in present:
        hint = "A row with choices needs a 'question' and an 'answer' too."
    raise ValueError(
        f"{row.place}: columns {sorted(row.values)} fit no format; accepted are {_ACCEPTED}. {hint}"
    )


def to_examples(rows: Iterable[Row], format: str, *, has_template: bool) -> Iterator[Example]:
    """Yield one checked example per row; every row must have the format of the first.

    Without a chat template, instructions become plain text.
    """
    assert format in ("auto", *COLUMNS)
    for row in rows:
        if format == "auto":
            format = detect_format(row)
        if format != "mmlu":  # whose check knows its three layouts
            _check_columns(row, format)
            if format == "sharegpt":
                row = sharegpt.with_messages(row)
            row = chat_images.with_images(row)
            check_unused(row, format)
        yield _to_example(row, format, has_template)


def _to_example(row: Row, format: str, has_template: bool) -> Example:
    if format == "mmlu":
        question = to_question(row)
        return Example(row.place, question.prompt(), question.completion())
    if format == "text":
        return Example(row.place, "", _text(row, "text"))
    if format == "instruction":
        return _from_instruction(row, has_template)
    if format in ("messages", "sharegpt"):
        (column,), fix = COLUMNS[format], "add the answer or remove the row."
        return _chat(row, column, [], _messages(row, column), fix)
    return to_answer(row, "completion")


def to_answer(row: Row, column: str) -> Example:
    """Return the example of a row's prompt and what `column` answers to it.

    Without a prompt it is the whole text or chat that `column` holds.
    """
    prompt, completion = row.values.get("prompt"), row.values[column]
    if prompt is None:
        if isinstance(completion, list):
            fix = "end the chat with an answer of the role 'assistant'."
            return _chat(row, column, [], _messages(row, column), fix)
        return Example(row.place, "", _text(row, column))
    if isinstance(prompt, list) != isinstance(completion, list):
        raise ValueError(
            f"{row.place}: 'prompt' is a {type(prompt).__name__} and {column!r} a "
            f"{type(completion).__name__}; both must be strings or both lists of messages."
        )
    if not isinstance(prompt, list):
        return Example(row.place, _text(row, "prompt"), _text(row, column))
    context = _messages(row, "prompt", is_context=True)
    fix = "give the answer the role 'assistant'."
    return _chat(row, column, context, _messages(row, column), fix)


def to_prompt(row: Row) -> str | list[Message]:
    """Return the prompt of a row: a text, or a chat that somebody else than the model ends."""
    if not isinstance(row.values["prompt"], list):
        return _text(row, "prompt")
    messages = _messages(row, "prompt", is_context=True)
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            f"{row.place}: 'prompt' ends with an assistant turn, and the model is to write that; "
            "take the turn out."
        )
    return messages


def _from_instruction(row: Row, has_template: bool) -> Example:
    instruction, more = _text(row, "instruction"), row.values.get("input") or ""
    _check_type(more, str, "a string", f"{row.place}: 'input'")
    output = _text(row, "output")
    if not has_template:
        form = _INSTRUCTION_INPUT if more else _INSTRUCTION
        return Example(row.place, form.format(instruction=instruction, input=more), output)
    question = "\n\n".join(filter(None, (instruction, more)))
    return Example(
        row.place,
        [{"role": "user", "content": question}],
        [{"role": "assistant", "content": output}],
    )


def _chat(
    row: Row, column: str, prompt: list[Message], completion: list[Message], fix: str
) -> Example:
    """Make an example of a chat; weights become a list of turns that are not learned."""
    weights = [message.get("weight") for message in prompt + completion]
    skipped = [turn for turn, weight in enumerate(weights) if weight == 0]
    prompt, completion = (
        [{key: value for key, value in m.items() if key != "weight"} for m in messages]
        for messages in (prompt, completion)
    )
    tools = row.values.get("tools")
    if isinstance(tools, str):  # as tables keep them
        tools = sharegpt.parse_json(tools, f"{row.place}: 'tools'") if tools.strip() else None
    check_json(tools, f"{row.place}: 'tools'")
    tools = _functions(row.place, "'tools'", "tool", tools)
    example = Example(row.place, prompt, completion, tools, skipped)
    if not example.learned_turns:
        speaks = any(message["role"] == "assistant" for message in completion)
        of_weight = " of weight 1" if speaks else ""
        raise ValueError(
            f"{row.place}: {column!r} has no assistant turn{of_weight}, so nothing to learn; {fix}"
        )
    return example


def present_columns(row: Row) -> set[str]:
    """Return the columns that hold something; tables fill what a row lacks with nulls."""
    return {column for column, value in row.values.items() if value is not None}


def _formats_of(present: set[str]) -> list[str]:
    return [name for name, required in COLUMNS.items() if present.issuperset(required)]


def _check_columns(row: Row, format: str) -> None:
    present = present_columns(row)
    missing = [column for column in COLUMNS[format] if column not in present]
    if not missing:
        return
    if others := _formats_of(present):
        raise ValueError(
            f"{row.place}: format {others[0]!r} among rows of format {format!r}; "
            "one run takes one format: split the data or convert these rows."
        )
    raise ValueError(
        f"{row.place}: field {missing[0]!r} is missing (columns {sorted(present)}); "
        f"format {format!r} needs {', '.join(COLUMNS[format])}. Add it or remove the row."
    )


def check_unused(row: Row, format: str) -> None:
    """Refuse what would be left out of the text without a word."""
    if format == "text":  # Where such columns describe the text.
        return
    chats = (row.values.get(column) for column in ("prompt", "chosen"))
    is_chat = format in ("messages", "sharegpt") or any(isinstance(value, list) for value in chats)
    for column in (*_NOT_USED, *(() if is_chat else ("tools",))):
        if row.values.get(column):
            raise ValueError(
                f"{row.place}: column {column!r} is not used by format {format!r}; write it into "
                "`messages` and `tools` (system text as a turn, functions as tools), or remove it."
            )


def _check_type(value: Any, kind: type, rule: str, what: str) -> None:
    if not isinstance(value, kind):
        found = "missing" if value is None else f"a {type(value).__name__}"
        raise ValueError(f"{what} is {found}; it must be {rule}.")


def _check_filled(value: str | list[Any], what: str) -> None:
    if not (value.strip() if isinstance(value, str) else value):
        raise ValueError(f"{what} is empty; fill it or remove the row.")


def check_json(value: Any, what: str) -> None:
    """Refuse what tables hold and JSON cannot: dates, bytes, decimals."""
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} is no JSON ({error}); write it as text, or remove it.") from error


def _text(row: Row, column: str) -> str:
    value, what = row.values[column], f"{row.place}: {column!r}"
    _check_type(value, str, "a string", what)
    _check_filled(value, what)
    return str(value)


def _messages(row: Row, column: str, *, is_context: bool = False) -> list[Message]:
    value, what = row.values[column], f"{row.place}: {column!r}"
    rule = 'a list of messages, as {"role": "user", "content": "..."}'
    _check_type(value, list, rule, what)
    _check_filled(value, what)
    return [
        _message(row.place, f"{column}[{i}]", message, is_context)
        for i, message in enumerate(value)
    ]


def _message(place: str, where: str, message: Any, is_context: bool) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(
            f"{place}: {where} is {message!r:.80}; a message must be an object with the "
            "strings 'role' and 'content'."
        )
    _check_role(message["role"], f"{place}: role of {where}")
    kept = {key: value for key, value in message.items() if value is not None}
    for key, value in kept.items():
        check_json(value, f"{place}: {key!r} of {where}")
    kept = _with_weight(kept, f"{place}: {where}")
    content = kept.get("content")
    if isinstance(content, list):
        content = kept["content"] = _joined(content, f"{place}: content of {where}")
    _check_weight(f"{place}: weight of {where}", kept, is_context)
    calls = _functions(place, f"tool_calls of {where}", "call", kept.get("tool_calls"))
    if content in (None, "") and (calls or kept.get("function_call")):
        return {**kept, "content": ""}
    what = f"{place}: content of {where}"
    _check_type(content, str, "a string", what)
    _check_filled(str(content), what)
    return kept


def _check_role(role: str, what: str) -> None:
    """Refuse a role that no template knows: an answer of another name would not be learned."""
    if role in _ROLES:
        return
    meant = _MEANT.get(role.lower()) or nearest(role, _ROLES)
    hint = f"did you mean {meant!r}? " if meant else ""
    raise ValueError(f"{what} is {role!r:.80}; {hint}roles are {', '.join(_ROLES)}.")


def _joined(parts: list[Any], what: str) -> str:
    """Return the texts of OpenAI's content parts in lines of their own, as vLLM serves them."""
    for number, part in enumerate(parts):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(
                f"{what}: part {number} is {kind!r:.40}; a part must be "
                '{"type": "text", "text": "..."}; images are for supervised fine-tuning alone.'
            )
    return "\n".join(part["text"] for part in parts)


def _with_weight(message: Message, what: str) -> Message:
    """Return a message whose flags of other programs are a weight, as OpenAI's data has it."""
    if finer := [name for name in _FINER if message.get(name)]:
        raise ValueError(
            f"{what} has {finer[0]!r}, and a turn is learned as a whole or not at all; remove it, "
            "or give the turn a 'weight' of 0 or 1."
        )
    found = {name: message[name] for name in ("weight", *_FLAGS) if name in message}
    flags = {name: value for name, value in found.items() if name != "weight"}
    for name, value in flags.items():
        if value not in (0, 1):
            raise ValueError(f"{what} has {name!r} ({value!r}); it must be true or false.")
    if len(set(found.values())) > 1:
        raise ValueError(f"{what} is learned and is not, by its flags {found}; keep one of them.")
    rest = {key: value for key, value in message.items() if key not in _FLAGS}
    return {**rest, "weight": int(next(iter(flags.values())))} if flags else rest


def _check_weight(what: str, message: Message, is_context: bool) -> None:
    weight = message.get("weight", 0)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(f"{what} is {weight!r}; it must be 0 or 1: whether the turn is learned.")
    if weight and (is_context or message["role"] != "assistant"):
        raise ValueError(
            f"{what} is 1, but only assistant turns outside a prompt are learned; remove the "
            "weight."
        )


def _functions(place: str, where: str, kind: str, value: Any) -> list[Any] | None:
    """Check a list of tools or calls: each names its function."""
    if value is None:
        return None
    _check_type(value, list, f"a list of {kind}s", f"{place}: {where}")
    for number, item in enumerate(value):
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"{place}: item {number} of {where} is {item!r:.80}; a {kind} must be an object "
                "with a name, or with a 'function' that has one."
            )
    return list(value)
