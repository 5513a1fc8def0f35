"""Read JSON that a stranger wrote: bounded in size and depth, strict in grammar."""

import json
import math
import unicodedata
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 16 * 2**20  # more than any model's configuration or index has
_MAX_DEPTH = 16
_MAX_DIGITS = 40  # transformers writes 10**30 as no limit of a tokenizer


def read_json_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read one JSON object from a regular file; refuse all else, and what is large or deep."""
    with path.open("rb") as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise ValueError(
            f"{path} is {path.stat().st_size} bytes; at most {max_bytes} are read. "
            "It is not a file that training writes."
        )
    parsed = parse_json_object(raw, source=str(path))
    check_strings(parsed, str(path))
    return parsed


def parse_json_object(raw: bytes, *, source: str) -> dict[str, Any]:
    """Parse bytes that must hold one JSON object; errors begin with `source`."""

    def to_number(text: str) -> int | float:
        if not math.isfinite(number := float(text)):
            raise ValueError(f"{text[:80]} is no finite number")
        if len(text) > _MAX_DIGITS:
            raise ValueError(f"a number has {len(text)} digits; at most {_MAX_DIGITS} are read")
        return int(text) if text.removeprefix("-").isdigit() else number

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice!r} stands twice")
        return result

    try:
        parsed = json.loads(
            raw.decode(),
            object_pairs_hook=unique,
            parse_constant=to_number,
            parse_float=to_number,
            parse_int=to_number,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON: {error}. The file is damaged.") from error
    if not isinstance(parsed, dict):
        raise ValueError(
            f"{source} holds a JSON {type(parsed).__name__}; it must be an object, {{...}}."
        )
    return parsed


def check_strings(value: Any, source: str, depth: int = 0) -> None:
    """Refuse control characters in every string of a value of JSON, and one nested too deep."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{source} is nested deeper than {_MAX_DEPTH} levels.")
    # These strings are printed: an escape sequence could rewrite the terminal around them.
    if isinstance(value, str):
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
            raise ValueError(
                f"{source} holds the string {value[:80]!a}; control characters are not allowed."
            )
    elif isinstance(value, dict | list):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            check_strings(item, source, depth + 1)
