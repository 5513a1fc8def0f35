"""The accepted formats: which one a row has, and each as one kind of example."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, cast, get_args

from pacatune.data.config import Format
from pacatune.data.mmlu import to_question
from pacatune.data.read import Row

Message = dict[str, Any]

# Required columns, most specific first: a row that fits several is the first of them.
COLUMNS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
    "mmlu": ("question", "choices", "answer"),
}
_ACCEPTED = (
    "messages | prompt, completion | instruction, (input,) output | text | "
    "question, choices, answer"
)

# Columns of other programs that say something to the model.
_NOT_USED = ("system", "history", "functions", "images", "documents", "chat_template_kwargs")

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
    def learned_turns(self) -> list[int]:
        """Those of `messages`, from 0, that are learned."""
        turns = range(len(self.prompt), len(self.messages))
        return [
            turn
            for turn in turns
            if self.messages[turn]["role"] == "assistant" and turn not in self.skipped
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dictionary."""
        return asdict(self)


def detect_format(row: Row) -> Format:
    """Return the format that the columns of `row` fit.

    Raises:
        ValueError: If they fit none; lists the columns found and the formats accepted.
    """
    present = _present(row)
    for name, required in COLUMNS.items():
        if all(column in present for column in required):
            return name
    hint = "Rename the columns."
    if "conversations" in row.values:
        hint = (
            "These look like ShareGPT's: rename 'conversations' to 'messages', and in each turn "
            "'from' to 'role' (human: user, gpt: assistant) and 'value' to 'content'."
        )
    elif "choices" in present:
        hint = "A row with choices needs a 'question' and an 'answer' too."
    raise ValueError(
        f"{row.place}: columns {sorted(row.values)} fit no format; accepted are {_ACCEPTED}. {hint}"
    )


def to_examples(rows: Iterable[Row], format: str, *, has_template: bool) -> Iterator[Example]:
    """Yield one checked example per row; every row must have the format of the first.

    Args:
        rows: Rows of the data.
        format: A format, or "auto" for that of the first row.
        has_template: Whether the tokenizer has a chat template; without one, instructions
            become plain text.

    Raises:
        ValueError: If a row lacks a field, has an empty one or one of another type, or is of
            another format than the rows before it.
    """
    chosen = None if format == "auto" else cast(Format, format)
    assert chosen is None or chosen in get_args(Format)
    for row in rows:
        if chosen is None:
            chosen = detect_format(row)
        if chosen != "mmlu":  # whose check knows its three layouts
            _check_columns(row, chosen)
            _check_unused(row, chosen)
        yield _CONVERTERS[chosen](row, has_template)


def _present(row: Row) -> set[str]:
    """Columns that hold something; tables fill what a row lacks with nulls."""
    return {column for column, value in row.values.items() if value is not None}


def _check_columns(row: Row, format: Format) -> None:
    missing = [column for column in COLUMNS[format] if column not in _present(row)]
    if not missing:
        return
    others = [
        name for name, required in COLUMNS.items() if all(c in _present(row) for c in required)
    ]
    if others:
        raise ValueError(
            f"{row.place}: format {others[0]!r} among rows of format {format!r}; "
            "one run takes one format: split the data or convert these rows."
        )
    raise ValueError(
        f"{row.place}: field {missing[0]!r} is missing (columns {sorted(_present(row))}); "
        f"format {format!r} needs {', '.join(COLUMNS[format])}. Add it or remove the row."
    )


def _check_unused(row: Row, format: Format) -> None:
    """Refuse what would be left out of the text without a word."""
    if format == "text":  # Where such columns describe the text.
        return
    is_chat = format == "messages" or isinstance(row.values.get("prompt"), list)
    for column in (*_NOT_USED, *(() if is_chat else ("tools",))):
        if row.values.get(column):
            raise ValueError(
                f"{row.place}: column {column!r} is not used by format {format!r}; write it into "
                "`messages` and `tools` (system text as a turn, functions as tools), or remove it."
            )


def _text(row: Row, column: str) -> str:
    value = row.values[column]
    if not isinstance(value, str):
        raise ValueError(
            f"{row.place}: {column!r} is a {type(value).__name__}; it must be a string."
        )
    if not value.strip():
        raise ValueError(f"{row.place}: {column!r} is empty; fill it or remove the row.")
    return value


def _messages(row: Row, column: str, *, is_context: bool = False) -> list[Message]:
    value = row.values[column]
    if not isinstance(value, list):
        raise ValueError(
            f"{row.place}: {column!r} is a {type(value).__name__}; it must be a list of messages, "
            'as {"role": "user", "content": "..."}.'
        )
    if not value:
        raise ValueError(f"{row.place}: {column!r} is empty; fill it or remove the row.")
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
    content = message.get("content")
    kept = {key: value for key, value in message.items() if value is not None}
    _check_weight(place, where, kept, is_context)
    calls = _functions(place, f"tool_calls of {where}", "call", kept.get("tool_calls"))
    if content in (None, "") and (calls or kept.get("function_call")):
        return {**kept, "content": ""}
    if not isinstance(content, str):
        kind = "missing" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"{place}: content of {where} is {kind}; it must be a string.")
    if not content.strip():
        raise ValueError(f"{place}: content of {where} is empty; fill it or remove the row.")
    return kept


def _check_weight(place: str, where: str, message: Message, is_context: bool) -> None:
    weight = message.get("weight", 0)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(
            f"{place}: weight of {where} is {weight!r}; it must be 0 or 1: whether the turn is "
            "learned."
        )
    if weight and (is_context or message["role"] != "assistant"):
        raise ValueError(
            f"{place}: weight of {where} is 1, but only assistant turns outside a prompt are "
            "learned; remove the weight."
        )


def _functions(place: str, where: str, kind: str, value: Any) -> list[Any] | None:
    """Check a list of tools or calls: each names its function."""
    if value is None:
        return None
    if not isinstance(value, list):
        raise ValueError(
            f"{place}: {where} is a {type(value).__name__}; it must be a list of {kind}s."
        )
    for number, item in enumerate(value):
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"{place}: item {number} of {where} is {item!r:.80}; a {kind} must be an object "
                "with a name, or with a 'function' that has one."
            )
    return value


def _tools(row: Row) -> list[Any] | None:
    return _functions(row.place, "'tools'", "tool", row.values.get("tools"))


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
    example = Example(row.place, prompt, completion, _tools(row), skipped)
    if not example.learned_turns:
        speaks = any(message["role"] == "assistant" for message in completion)
        of_weight = " of weight 1" if speaks else ""
        raise ValueError(
            f"{row.place}: {column!r} has no assistant turn{of_weight}, so nothing to learn; {fix}"
        )
    return example


def _from_messages(row: Row, has_template: bool) -> Example:
    fix = "add the answer or remove the row."
    return _chat(row, "messages", [], _messages(row, "messages"), fix)


def _from_prompt_completion(row: Row, has_template: bool) -> Example:
    prompt, completion = row.values["prompt"], row.values["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise ValueError(
            f"{row.place}: 'prompt' is a {type(prompt).__name__} and 'completion' a "
            f"{type(completion).__name__}; both must be strings or both lists of messages."
        )
    if not isinstance(prompt, list):
        return Example(row.place, _text(row, "prompt"), _text(row, "completion"))
    context = _messages(row, "prompt", is_context=True)
    fix = "give the answer the role 'assistant'."
    return _chat(row, "completion", context, _messages(row, "completion"), fix)


def _from_instruction(row: Row, has_template: bool) -> Example:
    fields = {"instruction": _text(row, "instruction"), "input": row.values.get("input") or ""}
    if not isinstance(fields["input"], str):
        raise ValueError(
            f"{row.place}: 'input' is a {type(fields['input']).__name__}; it must be a string."
        )
    output = _text(row, "output")
    if not has_template:
        form = _INSTRUCTION_INPUT if fields["input"] else _INSTRUCTION
        return Example(row.place, form.format(**fields), output)
    question = "\n\n".join(filter(None, (fields["instruction"], fields["input"])))
    return Example(
        row.place,
        [{"role": "user", "content": question}],
        [{"role": "assistant", "content": output}],
    )


def _from_text(row: Row, has_template: bool) -> Example:
    return Example(row.place, "", _text(row, "text"))


def _from_mmlu(row: Row, has_template: bool) -> Example:
    question = to_question(row)
    return Example(row.place, question.prompt(), question.completion())


_CONVERTERS = {
    "messages": _from_messages,
    "prompt-completion": _from_prompt_completion,
    "instruction": _from_instruction,
    "text": _from_text,
    "mmlu": _from_mmlu,
}
