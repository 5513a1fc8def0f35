"""Regular expressions in the options of an adapter: that they compile, what they fit, and how long.

Python and PEFT try every way to share a module's name among the parts of a pattern. In the file of
a stranger a pattern of a few signs may have more ways than there is time for.
"""

import re
from collections.abc import Iterable, Mapping
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
_ESCAPES_AND_CLASSES = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]])*\]", re.S)
_COMMENTS, _VERBOSE = re.compile(r"\(\?#[^)]*\)"), re.compile(r"\(\?\w*x")
_INNERMOST_GROUP = re.compile(r"\((?:\?(?:P<\w+>|<?[:=!>]|\w*:)|\?)?([^()]*)\)(?=([*+{]?))")
_REPEAT = re.compile(r"(?:[*+]|\{[^}]*\})[?+]?")
# Of a name of 60 signs, four repeats share the parts in 600,000 ways: 10 ms for each module.
_MAX_REPEATS, _MAX_CHOICES = 4, 10


def check_patterns(options: Mapping[str, Any], section: str = "") -> None:
    """Refuse regular expressions in an adapter's options that do not compile or take for ever.

    Each of `PATTERN_OPTIONS` is one pattern, a list, or a dictionary by patterns; `section`, such
    as "paca.", stands before the name of an option in the message.
    """
    for option, pattern in _patterns(options):
        try:
            if _PLAIN_NAME.fullmatch(pattern):  # thousands of names need no compiling
                continue
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError, TypeError) as error:
            raise ValueError(
                f"`{section}{option}` ({str(pattern)[:80]!r}) is no regular expression: "
                f"{error}; mend it, or put a backslash before a sign that stands for itself."
            ) from error
        if _has_many_ways(pattern):
            raise ValueError(
                f"`{section}{option}` ({pattern[:80]!r}) could be tried in more ways than there is "
                f"time for: use at most {_MAX_REPEATS} repeats (`*`, `+`, `{{`), none of a group "
                "that has repeats or alternatives itself, or the modules' names."
            )


def matching_key(patterns: Iterable[str], name: str) -> str | None:
    """Return the first pattern that fits the end of a module's name, as PEFT's get_pattern_key."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", name)), None)


def _patterns(options: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for option in PATTERN_OPTIONS:
        value = options.get(option)
        for pattern in value if isinstance(value, (list, tuple, set, dict)) else [value or ""]:
            yield option, pattern


def _has_many_ways(pattern: str) -> bool:
    """Whether repeats are many or in one another; escapes and classes of signs are one sign."""
    text = _COMMENTS.sub("", _ESCAPES_AND_CLASSES.sub("a", pattern))
    if _VERBOSE.search(text):  # there a repeat may stand anywhere behind its group
        return True
    num_choices = 0
    while group := _INNERMOST_GROUP.search(text):
        inside, is_repeated = group[1], group[2] != ""
        has_ways = re.search(r"[*+{?|~]", inside)
        if is_repeated and has_ways:
            return True
        num_choices += _num_choices(inside)
        stands_for_it = "*" * _most_repeats(inside) + ("~" if has_ways else "a")
        text = text[: group.start()] + stands_for_it + text[group.end() :]
    return _most_repeats(text) > _MAX_REPEATS or num_choices + _num_choices(text) > _MAX_CHOICES


def _num_choices(text: str) -> int:
    """Count alternatives and `?`, each of which may be tried both ways; groups are resolved."""
    return ("|" in text) + _REPEAT.sub("", text).count("?")


def _most_repeats(text: str) -> int:
    """Return the number of repeats in the alternative that has most; groups are resolved."""
    return max(len(_REPEAT.findall(part)) for part in text.split("|"))
