"""Regular expressions in the options of adapters: whether they compile. Imports nothing heavy."""

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
_PLAIN = re.compile(r"[\w.]*")


def check_patterns(options: Mapping[str, Any], section: str = "") -> None:
    """Refuse regular expressions in an adapter's options that do not compile.

    Each of `PATTERN_OPTIONS` is one pattern, a list, or a dictionary by patterns; `section`, such
    as "paca.", stands before the name of an option in the message.
    """
    for option in PATTERN_OPTIONS:
        value = options.get(option)
        patterns = value if isinstance(value, (list, tuple, set, dict)) else [value or ""]
        for pattern in patterns:
            try:
                # Thousands of plain names need no compiling.
                _PLAIN.fullmatch(pattern) or re.compile(pattern)
            except (re.error, OverflowError, RecursionError, TypeError) as error:
                raise ValueError(
                    f"`{section}{option}` ({str(pattern)[:80]!r}) is no regular expression: "
                    f"{error}; mend it, or put a backslash before a sign that stands for itself."
                ) from error


def matching_key(patterns: Iterable[str], name: str) -> str | None:
    """Return the first pattern that fits the end of a module's name, as PEFT's get_pattern_key."""
    return next((one for one in patterns if re.match(rf"(.*\.)?({one})$", name)), None)
