"""What a judge wrote, out of an OpenAI-compatible reply."""

import json
from dataclasses import dataclass
from typing import Any

__all__ = ["Reply", "read_reply"]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a judge wrote."""

    text: str
    """Empty where the judge wrote nothing."""
    model: str | None
    """Which model the endpoint says has answered."""
    finish_reason: str | None
    usage: dict[str, int]
    """Tokens of prompt and answer, as the endpoint counts them."""
    temperature: float | None
    """That it was asked for; None if the endpoint takes none."""


def read_reply(raw: bytes, temperature: float | None) -> Reply:
    """Read the body of a reply.

    Args:
        raw: As it came.
        temperature: That was asked for.

    Raises:
        ValueError: If it is something else; shows how it begins.
    """
    try:
        parsed = json.loads(raw)
        choice = parsed["choices"][0]
        text = choice["message"]["content"]
        usage = parsed.get("usage") or {}
        if not isinstance(text, str | None):
            raise TypeError
        return Reply(
            text=text or "",
            model=_text_or_none(parsed.get("model")),
            finish_reason=_text_or_none(choice.get("finish_reason")),
            usage={
                name: usage[name]
                for name in ("prompt_tokens", "completion_tokens")
                if isinstance(usage.get(name), int)
            },
            temperature=temperature,
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        start = raw[:100].decode(errors="replace")
        raise ValueError(f"something else than an OpenAI-compatible reply: {start!r}") from None


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None
