"""Read JSON that a stranger wrote: bounded in size and depth, strict in grammar."""

import json
import math
import re
import unicodedata
from pathlib import Path
from typing import Any, NoReturn

MAX_JSON_BYTES = 4 * 2**20
MAX_JSON_DEPTH = 16
_MAX_DIGITS = 40  # transformers writes 10**30 as no limit of a tokenizer

# A whole string, closed or not, so that brackets inside strings do not count; or one bracket.
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read one JSON object from a regular file of at most 4 MiB and 16 levels; refuse all else."""
    with path.open("rb") as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise ValueError(
            f"{path} is {path.stat().st_size} bytes; at most {MAX_JSON_BYTES} are read. "
            "It is not a file that training writes."
        )
    parsed = parse_json_object(raw, source=str(path))
    check_strings(parsed, str(path))
    return parsed


def parse_json_object(raw: bytes, *, source: str) -> dict[str, Any]:
    """Parse bytes that must hold one JSON object, as `read_json_object` but for size and strings.

    Errors begin with `source`, where they come from.
    """
    _check_depth(raw, source)

    def refuse(value: str) -> NoReturn:
        raise ValueError(f"{source} holds {value[:80]}, which is no finite number; write one.")

    def parse_float(digits: str) -> float:
        return number if math.isfinite(number := float(digits)) else refuse(digits)

    def parse_int(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise ValueError(
                f"{source} holds a number of {len(digits)} digits; at most {_MAX_DIGITS} are read."
            )
        return int(digits)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"{source} gives the key {key!r} twice; keep one of them.")
            result[key] = value
        return result

    try:
        parsed = json.loads(
            raw.decode(),
            object_pairs_hook=unique,
            parse_constant=refuse,
            parse_float=parse_float,
            parse_int=parse_int,
        )
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{source} is not valid JSON: {error}. The file is damaged.") from error
    if not isinstance(parsed, dict):
        raise ValueError(
            f"{source} holds a JSON {type(parsed).__name__}; it must be an object, {{...}}."
        )
    return parsed


def _check_depth(raw: bytes, source: str) -> None:
    # json.loads recurses once per level and dies with RecursionError: count before it starts.
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(raw):
        token = match.group()
        if token in (b"{", b"["):
            depth += 1
        elif token in (b"}", b"]"):
            depth -= 1
        if depth > MAX_JSON_DEPTH:
            raise ValueError(
                f"{source} is nested deeper than {MAX_JSON_DEPTH} levels; it is not a file that "
                "training writes."
            )


def check_strings(value: Any, source: str) -> None:
    """Refuse control characters in every string of a value of JSON."""
    # These strings are printed: an escape sequence could rewrite the terminal around them.
    if isinstance(value, str):
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
            raise ValueError(
                f"{source} holds the string {value[:80]!a}; control characters are not allowed."
            )
    elif isinstance(value, dict | list):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            check_strings(item, source)
