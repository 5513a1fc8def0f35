"""Regular expressions in the options of an adapter: that they compile, what they fit, and how long.

Python and PEFT try every way to share a module's name among the parts of a pattern. In the file of
a stranger a pattern of a few signs may have more ways than there is time for, so these are counted.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise, takewhile
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

# PEFT compiles these, names of modules included, and only when it looks for modules.
PATTERN_OPTIONS = (
    "target_modules",
    "exclude_modules",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "columns",
    "modules_to_save",
)
_PLAIN_NAME = re.compile(r"[\w.]*")
_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT)
_LEAVES = (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN, op.AT, op.FAILURE, op.GROUPREF)
# Where the part of a name that a repeat has may end: anywhere, or before one of some signs.
_PLACES, _FEW_PLACES = 64, 8
_MAX_WAYS = 2**19  # `.*.*.*_proj` has 2**15: 1 ms for each module
_MAX_STEPS = 2**31
_CAP = 2**64


def check_patterns(options: Mapping[str, Any], section: str = "") -> None:
    """Refuse regular expressions in an adapter's options that do not compile.

    Each of `PATTERN_OPTIONS` is one pattern, a list, or a dictionary by patterns; `section`, such
    as "paca.", stands before the name of an option in the message.
    """
    for option, pattern in _patterns(options):
        try:
            # Thousands of plain names need no compiling.
            _PLAIN_NAME.fullmatch(pattern) or re.compile(pattern)
        except (re.error, OverflowError, RecursionError, TypeError) as error:
            raise ValueError(
                f"`{section}{option}` ({str(pattern)[:80]!r}) is no regular expression: "
                f"{error}; mend it, or put a backslash before a sign that stands for itself."
            ) from error


def check_effort(
    options: Mapping[str, Any], names: Collection[str] = (), *, source: str = ""
) -> None:
    """Refuse regular expressions of a stranger that could be tried for ever; they must compile.

    Args:
        options: See `check_patterns`.
        names: The names that they are matched with, where a stranger chose these as well.
        source: Begins the message.
    """
    # Repeats share a name, so each has half of it or so.
    places = max(map(len, names)) // 2 + 1 if names else _PLACES
    few = places if names else _FEW_PLACES
    # What stands before a pattern in a name is tried at each of its dots.
    steps, most = (len(names) * places, _MAX_STEPS) if names else (1, _MAX_WAYS)
    total = 0
    for option, pattern in _patterns(options):
        is_plain = _PLAIN_NAME.fullmatch(pattern)
        total += steps * (1 if is_plain else _ways(_parser.parse(pattern), places, few))
        if total > most:
            raise ValueError(
                f"{source}`{option}` ({pattern[:80]!r}) can be tried in too many ways to be taken "
                "from a file; use fewer repeats (`*`, `+`), none in another, or the modules' names."
            )


def matching_key(patterns: Iterable[str], name: str) -> str | None:
    """Return the first pattern that fits the end of a module's name, as PEFT's get_pattern_key."""
    return next((one for one in patterns if re.match(rf"(.*\.)?({one})$", name)), None)


def _patterns(options: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for option in PATTERN_OPTIONS:
        value = options.get(option)
        for pattern in value if isinstance(value, (list, tuple, set, dict)) else [value or ""]:
            yield option, pattern


def _ways(items: Sequence[Any], places: int, few: int) -> int:
    """Count in how many ways parsed parts may be tried from one place of a name on, at most."""
    ways = 1
    for number, (kind, value) in enumerate(items):
        if kind in _REPEATS:
            least, most, body = value
            most = min(most, places)
            ends = max(1, most - least + 1)
            if _is_fixed(items[number + 1 : number + 2]):
                ends = min(ends, few)
            ways *= _ways(body, places, few) ** most * ends
        elif kind is op.BRANCH:
            counts = [_ways(branch, places, few) for branch in value[1]]
            ways *= sum(counts) if _may_share(value[1]) else max(counts)
        elif kind in (op.SUBPATTERN, op.ASSERT, op.ASSERT_NOT):
            ways *= _ways(value[-1], places, few)
        elif kind is op.ATOMIC_GROUP:
            ways *= _ways(value, places, few)
        elif kind not in _LEAVES:
            return _CAP
        ways = min(ways, _CAP)
    return ways


def _is_fixed(items: Sequence[Any]) -> bool:
    """Whether parts begin with certain signs, or an end, which few places of a name have."""
    if not items:
        return False
    kind, value = items[0]
    if kind is op.IN:
        return all(one is op.LITERAL for one, _ in value)
    if kind is op.SUBPATTERN:
        return _is_fixed(value[-1])
    if kind is op.BRANCH:
        return all(map(_is_fixed, value[1]))
    return kind in (op.LITERAL, op.AT)


def _may_share(branches: Sequence[Any]) -> bool:
    """Whether two alternatives may fit at one place: one begins as the other does, or unknown."""
    starts = []
    for branch in branches:
        known = takewhile(lambda part: part[0] is op.LITERAL and part[1] < 128, branch)
        starts.append([chr(sign).lower() for _, sign in known])
    starts.sort()
    return any(after[: len(before)] == before for before, after in pairwise(starts))
