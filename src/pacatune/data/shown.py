"""What a chat template shows of a chat: most drop what they do not know without a word."""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

from pacatune.data.formats import Example, Message

Render = Callable[[list[Message], list[Any] | None], str]
_StandIn = Callable[[str], str]

_NEEDED = ("content", "tool_calls")
# What an assistant writes besides: needed where it is to be learned, else the template's choice.
_WRITTEN = ("function_call", "reasoning_content", "reasoning", "thinking")
_BOOKKEEPING = ("role", "tool_call_id", "id")
_UNREAD = re.compile(r'[\s\\"]+')


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """A tool (turn None) or a field of a message, and the texts in it."""

    name: str
    turn: int | None
    texts: list[str]


def check_shown(example: Example, learned: Collection[int], render: Render) -> list[str]:
    """Check that a template shows everything of a chat that is read or learned.

    The chat is rendered a second time with a mark in place of each text: no mark may be missing.

    Args:
        example: The chat.
        learned: Turns that are learned, from 0.
        render: Renders messages and tools to text; raises ValueError where it cannot.

    Returns:
        Names of the fields that are not shown and need not be, as "name" or "rating".

    Raises:
        ValueError: If the chat cannot be rendered, or if a tool, a tool call, the content of a
            turn or anything else that a learned turn says is not shown.
    """
    text = _squeeze(render(example.messages, example.tools))
    for turn in learned:
        if _squeeze(example.messages[turn]["content"]) not in text:
            _refuse(example, f"all of the content of turn {turn + 1}")
    marks = (f"zq{number}qz" for number in itertools.count())
    messages, tools, parts = _mark_chat(example, lambda _: next(marks))
    try:
        text = _squeeze(render(messages, tools))
    except ValueError:  # The template asks for certain texts: look for those of the chat itself.
        parts = _mark_chat(example, lambda piece: piece)[2]
    hidden = set()
    for part in parts:
        missing = [piece for piece in part.texts if _squeeze(piece) not in text]
        if not missing:
            continue
        if part.turn is None:
            _refuse(example, part.name)
        if part.name in _NEEDED or (part.name in _WRITTEN and part.turn in learned):
            role = example.messages[part.turn]["role"]
            _refuse(example, f"{part.name} of turn {part.turn + 1} (role {role!r})")
        if part.name not in _WRITTEN and len(missing) == len(part.texts):
            hidden.add(part.name)
    return sorted(hidden)


def with_arguments(example: Example, *, as_text: bool) -> Example:
    """Return a chat whose tool calls all have their arguments as objects, or all as JSON.

    Most templates write JSON themselves and would write that of a text twice; some can only take
    a text. Arguments that are no JSON object stay as they are.
    """

    def convert(arguments: Any) -> Any:
        found = _parse(arguments)
        if not isinstance(found, dict):
            return arguments
        return json.dumps(found, ensure_ascii=False) if as_text else found

    def convert_all(messages: str | list[Message]) -> str | list[Message]:
        assert isinstance(messages, list)
        return [
            {**m, "tool_calls": [_map_function(c, {"arguments": convert}) for c in m["tool_calls"]]}
            if m.get("tool_calls")
            else m
            for m in messages
        ]

    return dataclasses.replace(
        example, prompt=convert_all(example.prompt), completion=convert_all(example.completion)
    )


def _mark_chat(
    example: Example, stand_in: _StandIn
) -> tuple[list[Message], list[Any] | None, list[_Part]]:
    """Copy messages and tools with `stand_in` of each text, and list what has to be looked for."""
    parts: list[_Part] = []

    def mark(value: Any) -> Any:
        """Replace every text and number, and note what stands there now."""
        if isinstance(value, dict):
            return {key: mark(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [mark(inner) for inner in value]
        if value is None or isinstance(value, bool) or not str(value).strip():
            return value
        parts[-1].texts.append(stand_in(str(value)))
        return parts[-1].texts[-1]

    def mark_arguments(value: Any) -> Any:
        found = _parse(value)
        is_text = isinstance(value, str) and isinstance(found, dict)
        return json.dumps(mark(found)) if is_text else mark(value)

    messages = []
    for turn, message in enumerate(example.messages):
        copy = dict(message)
        for name, value in message.items():
            if name in _BOOKKEEPING or (name == "name" and message["role"] == "tool"):
                continue
            parts.append(_Part(name, turn, []))
            if name == "tool_calls":
                marks = {"name": mark, "arguments": mark_arguments}
                copy[name] = [_map_function(call, marks) for call in value]
            else:
                copy[name] = mark(value)
        messages.append(copy)
    tools = []
    for number, tool in enumerate(example.tools or ()):
        parts.append(_Part(f"tools[{number}]", None, []))
        tools.append(_map_function(tool, {"name": mark}))
    return messages, None if example.tools is None else tools, parts


def _map_function(
    holder: dict[str, Any], maps: Mapping[str, Callable[[Any], Any]]
) -> dict[str, Any]:
    """Copy a tool or call with some fields of its function mapped."""
    if isinstance(holder.get("function"), dict):
        return {**holder, "function": _map_function(holder["function"], maps)}
    return {key: maps[key](value) if key in maps else value for key, value in holder.items()}


def _parse(arguments: Any) -> Any:
    """Return what a JSON text says; anything else as it is."""
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _squeeze(text: str) -> str:
    """Drop what templates add and take away: white space, and the quoting of JSON."""
    return _UNREAD.sub("", text)


def _refuse(example: Example, what: str) -> NoReturn:
    raise ValueError(
        f"{example.place}: the chat template does not show {what}, so the model would learn the "
        "turns without it; give a `data.chat_template` that shows it, or take it out of the row."
    )
