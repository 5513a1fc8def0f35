"""The settings of a request in words that the judge takes.

OpenAI's reasoning models know `max_completion_tokens` where everybody else knows `max_tokens`, and
choose their temperature themselves. They say so when they refuse a request, which costs nothing.
"""

from typing import Any

__all__ = ["Dialect"]

_LIMIT, _NEW_LIMIT, _TEMPERATURE = "max_tokens", "max_completion_tokens", "temperature"


class Dialect:
    """What a request says about length and temperature; learns from refusals.

    Args:
        max_tokens: Most tokens of a reply, thoughts included.
        temperature: Of the judge's sampling.
    """

    def __init__(self, max_tokens: int, temperature: float) -> None:
        self._settings: dict[str, Any] = {_TEMPERATURE: temperature, _LIMIT: max_tokens}

    def settings(self) -> dict[str, Any]:
        """Return the fields for the next request."""
        return dict(self._settings)

    def learn(self, sent: dict[str, Any], refusal: str) -> bool:
        """See whether a refusal is about these fields.

        Several threads may learn the same; each asks about what it has sent itself.

        Args:
            sent: Fields of the request that was refused.
            refusal: What the endpoint said.

        Returns:
            Whether the request may be taken when it is sent with `settings()` anew.
        """
        if "support" not in refusal.lower():
            return False
        settings = self.settings()
        if _LIMIT in sent and _NEW_LIMIT in refusal:
            settings[_NEW_LIMIT] = settings.pop(_LIMIT, sent[_LIMIT])
        elif _TEMPERATURE in sent and _TEMPERATURE in refusal:
            settings.pop(_TEMPERATURE, None)
        else:
            return False
        self._settings = settings
        return True
