"""Ask a judge: one request to an OpenAI-compatible endpoint, repeated while it may help.

The key is in one header of the requests and nowhere else: not in a message, not in a file.
"""

import json
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

from pacatune.evaluation.mt_bench.questions import Prompt

__all__ = [
    "Dialect",
    "JudgeClient",
    "JudgeStopped",
    "JudgeUnavailable",
    "Reply",
    "RequestRefused",
    "checked_url",
    "read_reply",
]


# The address of an OpenAI-compatible endpoint.


def checked_url(url: str) -> str:
    """Return where to send requests: the address with `/chat/completions` at its end.

    Args:
        url: What the user gave; it is shown and saved, so it must hold no secret.

    Raises:
        ValueError: If it is none, or has a user, a password or a query in it.
    """
    try:
        parts = urlsplit(url)
        shown = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
        has_port = parts.port is None or parts.port > 0  # raises for one that is no number
    except ValueError:
        raise ValueError(
            "--judge-url must be like https://HOST/v1; the host or the port of the one given "
            "cannot be read."
        ) from None
    has_secret = bool(parts.query or parts.fragment or parts.username or parts.password)
    is_clean = url.isprintable() and " " not in url and has_port
    if parts.scheme not in ("http", "https") or not parts.hostname or has_secret or not is_clean:
        raise ValueError(
            f"--judge-url ({shown!r}) must be like https://HOST/v1, without user, password or "
            "query; a key goes into a variable: --judge-key-env NAME."
        )
    url = url.rstrip("/")
    return url if url.endswith("/chat/completions") else f"{url}/chat/completions"


# The settings of a request in words that the judge takes.
#
# OpenAI's reasoning models know `max_completion_tokens` where everybody else knows `max_tokens`,
# and choose their temperature themselves. They say so when they refuse a request, which costs
# nothing.


_LIMIT, _NEW_LIMIT, _TEMPERATURE = "max_tokens", "max_completion_tokens", "temperature"


class Dialect:
    """What a request says about length and temperature; learns from refusals.

    Args:
        max_tokens: Most tokens of a reply, thoughts included.
        temperature: Temperature of the judge's sampling.
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


# What a judge wrote, out of an OpenAI-compatible reply.


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


# Their cause may be gone a moment later.
_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_REFUSALS = frozenset({400, 413, 422})
_MAX_REPLY_BYTES = 8 * 2**20
_FIRST_WAIT_S, _LONGEST_WAIT_S, _LONGEST_ASKED_WAIT_S = 1.0, 60.0, 600.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class JudgeUnavailable(OSError):
    """The endpoint gives no answer to any request, now."""


class RequestRefused(ValueError):
    """The endpoint does not want this very request."""


class JudgeStopped(Exception):
    """Somebody has set the event that stops the work."""


@dataclass(kw_only=True)
class JudgeClient:
    """An endpoint and how patient to be with it."""

    url: str
    """Up to `/v1`, or the whole address of `/chat/completions`."""
    model: str
    """Name of the judge."""
    key: str | None = field(default=None, repr=False)
    """Sent as bearer token."""
    timeout_s: float = 120.0
    """Seconds for one request, from its start to the end of the reply."""
    max_retries: int = 6
    """How often a request is repeated that failed in a way that may pass."""
    temperature: float = 0.0
    """Left out where the endpoint says that its model takes none."""
    max_tokens: int = 2048
    """Most tokens of a reply."""
    stop: threading.Event = field(default_factory=threading.Event, repr=False)
    """Once set, no request is sent or repeated."""
    wait: Callable[[float], Any] | None = field(default=None, repr=False)
    """Waits that many seconds, or less if `stop` is set."""

    def __post_init__(self) -> None:
        """Check the address and the key."""
        self.url = checked_url(self.url)
        # http.client would show a header that it does not accept.
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise ValueError(
                "the judge's key has characters that no header can have; set the variable that "
                "--judge-key-env names again, without line breaks."
            )
        self._dialect = Dialect(self.max_tokens, self.temperature)
        # A request to this very machine needs no proxy, and few proxies would deliver it.
        self._is_near = urlsplit(self.url).hostname in _LOOPBACK
        proxies = urllib.request.ProxyHandler({} if self._is_near else None)
        self._opener = urllib.request.build_opener(proxies, _NoRedirects())

    @property
    def shows_key(self) -> bool:
        """Whether the key goes through a network unencrypted."""
        return self.key is not None and self.url.startswith("http://") and not self._is_near

    def check_reachable(self) -> None:
        """See that something listens at the address, which costs nothing.

        Raises:
            JudgeUnavailable: If nothing does.
        """
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        if not self._is_near and urllib.request.getproxies().get(parts.scheme):
            return  # only the proxy reaches it
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((host, port), timeout=min(self.timeout_s, 20.0)).close()
        except OSError as error:
            raise JudgeUnavailable(
                f"nothing answers at --judge-url {self.url} ({error}); start the judge or check "
                "the address. --no-judge only answers, and the same command without it judges "
                "those answers later."
            ) from error

    def ask(self, prompt: Prompt) -> Reply:
        """Return the judge's reply to one prompt.

        Raises:
            JudgeUnavailable: If the endpoint cannot be reached, is overloaded for too long,
                refuses the key, or speaks another language.
            RequestRefused: If it refuses this prompt.
            JudgeStopped: If `stop` is set.
        """
        for attempt in range(self.max_retries + 1):
            if self.stop.is_set():
                raise JudgeStopped
            try:
                return self._ask_once(prompt)
            except _Transient as failure:
                problem = self._clean(str(failure))
                if failure.is_final or attempt == self.max_retries:
                    break
                self._wait(_delay(attempt, failure.retry_after_s))
        tries = f" ({attempt + 1} tries)" if attempt else ""
        raise JudgeUnavailable(f"the judge at {self.url} gives no answer{tries}: {problem}")

    def _ask_once(self, prompt: Prompt) -> Reply:
        settings = self._dialect.settings()
        try:
            raw = self._post(prompt, settings)
        except RequestRefused as refusal:
            if not self._dialect.learn(settings, str(refusal)):
                raise
            return self._ask_once(prompt)  # at most twice: each time one field less is disputed
        try:
            return read_reply(raw, settings.get("temperature"))
        except ValueError as error:
            raise _Transient(str(error)) from None

    def _post(self, prompt: Prompt, settings: dict[str, Any]) -> bytes:
        messages = [
            {"role": "system", "content": prompt.system},
            {"role": "user", "content": prompt.user},
        ]
        body = {"model": self.model, "messages": messages, **settings}
        headers = {"Content-Type": "application/json", "User-Agent": "pacatune"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        deadline = time.monotonic() + self.timeout_s
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                raw = _read(response, deadline)
                return raw.replace(self.key.encode(), b"***") if self.key else raw
        except urllib.error.HTTPError as error:
            with error:
                raise self._failure(error) from None
        except TimeoutError:
            raise _Transient(f"no reply within {self.timeout_s:g} s") from None
        except (urllib.error.URLError, HTTPException, OSError) as error:
            raise _Transient(str(getattr(error, "reason", error)) or type(error).__name__) from None

    def _failure(self, error: urllib.error.HTTPError) -> Exception:
        if error.code in (401, 403):
            # Endpoints repeat parts of a key that they do not know: nothing of their text is shown.
            return JudgeUnavailable(
                f"the judge at {self.url} refuses the key ({error.code}); name the variable that "
                "holds it: --judge-key-env NAME."
            )
        text = self._clean(_error_text(error))
        if error.code in _REFUSALS:
            return RequestRefused(f"{error.code}: {text}")
        if error.code in _TRANSIENT:
            # No money left: no waiting helps.
            is_final = "insufficient_quota" in text
            return _Transient(f"{error.code}: {text}", _retry_after(error.headers), is_final)
        return JudgeUnavailable(
            f"the judge at {self.url} answers {error.code}: {text}; check --judge-url (it usually "
            f"ends in /v1) and --judge-model ({self.model!r})."
        )

    def _wait(self, seconds: float) -> None:
        (self.wait or self.stop.wait)(seconds)

    def _clean(self, text: str) -> str:
        if self.key:
            text = text.replace(self.key, "***")
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]


class _Transient(Exception):
    def __init__(
        self, message: str, retry_after_s: float | None = None, is_final: bool = False
    ) -> None:
        is_long = retry_after_s is not None and retry_after_s > _LONGEST_ASKED_WAIT_S
        super().__init__(f"{message} (come back in {retry_after_s:.0f} s)" if is_long else message)
        self.retry_after_s = retry_after_s
        self.is_final = is_final or is_long


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows nothing: the key would go along to wherever the redirect points."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _read(response: HTTPResponse, deadline: float) -> bytes:
    """Read a reply; the socket's own timeout starts anew with every byte."""
    parts = []
    num_bytes = 0
    while part := response.read1(2**16):
        parts.append(part)
        num_bytes += len(part)
        if num_bytes > _MAX_REPLY_BYTES:
            raise _Transient(f"a reply of more than {_MAX_REPLY_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    if response.length:
        raise _Transient(f"the reply breaks off, {response.length} bytes before its end")
    return b"".join(parts)


def _error_text(error: urllib.error.HTTPError) -> str:
    try:
        raw = error.read(2**16).decode(errors="replace")
    except (OSError, HTTPException):
        return str(error.reason)
    try:
        found = json.loads(raw)["error"]
        known = [str(found[key]) for key in ("message", "code") if found.get(key)]
        return " ".join(known) or str(error.reason)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return raw or str(error.reason)


def _retry_after(headers: Message) -> float | None:
    text = headers.get("Retry-After", "").strip()
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _delay(attempt: int, retry_after_s: float | None) -> float:
    """Return seconds to wait: twice as long each time, spread so that threads do not march."""
    wait_s: float = min(_FIRST_WAIT_S * 2**attempt, _LONGEST_WAIT_S)
    if retry_after_s is None:
        return wait_s * random.uniform(0.5, 1.0)
    return retry_after_s + wait_s * random.uniform(0.0, 0.5)
