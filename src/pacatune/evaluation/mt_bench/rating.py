"""Find the rating in what a judge wrote."""

import re

__all__ = ["HIGHEST", "LOWEST", "parse_rating"]

LOWEST, HIGHEST = 1, 10
_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_THOUGHT = re.compile(r"^\s*<think>.*?(</think>|\Z)", re.DOTALL)
_BACKUP = re.compile(r"\[(\d+\.?\d*)\]")


def parse_rating(text: str) -> int | float | None:
    """Return the rating in a judgment, or None if there is none from 1 to 10.

    The first `[[x]]` counts, as in FastChat, or else the first `[x]`. What a model thinks before
    it judges does not count.

    Args:
        text: What the judge wrote.
    """
    text = _THOUGHT.sub("", text)
    match = _RATING.search(text) or _BACKUP.search(text)
    if match is None:
        return None
    rating = float(match.group(1))
    if not LOWEST <= rating <= HIGHEST:
        return None
    return int(rating) if rating.is_integer() else rating
