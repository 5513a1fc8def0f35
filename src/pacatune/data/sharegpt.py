"""ShareGPT's rows as chats: `conversations` of turns with `from` and `value`.

The names of speakers, the columns `system` and `tools` (JSON), and turns that call functions are
those of LLaMA-Factory's data sets.
"""

import json
from dataclasses import replace
from typing import Any

from pacatune.data.read import Row
from pacatune.names import guess

COLUMN = "conversations"
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "function_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("observation", "tool"), "tool"),
}


def with_messages(row: Row) -> Row:
    """Return the row with its turns as messages.

    Raises:
        ValueError: If a speaker is not known, a call is no JSON, or two system texts are given.
    """
    values, turns = dict(row.values), row.values[COLUMN]
    if not isinstance(turns, list):  # the check of messages says what it must be
        return row
    messages = [_message(row.place, f"{COLUMN}[{i}]", turn) for i, turn in enumerate(turns)]
    if system := values.pop("system", None):
        if any(isinstance(m, dict) and m.get("role") == "system" for m in messages):
            raise ValueError(
                f"{row.place}: column 'system' ({system!r:.40}) and a turn of the system; keep one."
            )
        messages.insert(0, {"role": "system", "content": system})
    return replace(row, values={**values, COLUMN: messages})


def _message(place: str, where: str, turn: Any) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn  # a message already, or wrong
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in ROLES:
        hint = guess(str(speaker), ROLES)
        raise ValueError(
            f"{place}: {where} is from {speaker!r:.80}; {hint}known are {', '.join(ROLES)}."
        )
    message = {key: value for key, value in turn.items() if key not in ("from", "value")}
    message |= {"role": ROLES[speaker], "content": turn.get("value")}
    if speaker == "function_call":
        calls = parse_json(message["content"], f"{place}: the call of {where}")
        calls = calls if isinstance(calls, list) else [calls]
        message |= {"content": "", "tool_calls": [_call(call) for call in calls]}
    return message


def _call(call: Any) -> Any:
    return {"type": "function", "function": call} if isinstance(call, dict) else call


def parse_json(text: Any, what: str) -> Any:
    """Return what a JSON text of a row says."""
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        raise ValueError(f"{what} is {text!r:.80}; it must be JSON.") from None
