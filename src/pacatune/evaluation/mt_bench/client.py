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
from dataclasses import dataclass, field
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

from pacatune.evaluation.mt_bench.questions import Prompt

TEMPERATURE = 0.0
"""The judge's, as in FastChat; left out where an endpoint says that its model takes none."""

# Status codes whose cause may be gone a moment later.
_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_REFUSALS = frozenset({400, 413, 422})
_MAX_REPLY_BYTES = 8 * 2**20
_FIRST_WAIT_S, _LONGEST_WAIT_S, _LONGEST_ASKED_WAIT_S = 1.0, 60.0, 600.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# What reading a reply of another form raises.
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


class JudgeUnavailable(OSError):
    """The endpoint gives no answer to any request, now."""


class RequestRefused(ValueError):
    """The endpoint refuses this request, but maybe not others."""


class JudgeStopped(Exception):
    """`JudgeClient.stop` is set."""


class _Transient(Exception):
    """A failure that may pass, unless the wait that the endpoint asks for is too long."""

    def __init__(
        self, message: str, retry_after_s: float | None = None, is_final: bool = False
    ) -> None:
        is_long = retry_after_s is not None and retry_after_s > _LONGEST_ASKED_WAIT_S
        super().__init__(f"{message} (come back in {retry_after_s:.0f} s)" if is_long else message)
        self.retry_after_s = retry_after_s
        self.is_final = is_final or is_long


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a judge wrote."""

    text: str
    """Empty where the judge wrote nothing."""
    model: str | None
    """The one that the endpoint says has answered."""
    finish_reason: str | None
    usage: dict[str, int]
    """Tokens of prompt and answer."""
    temperature: float | None
    """None if the endpoint takes none."""


@dataclass(kw_only=True)
class JudgeClient:
    """An endpoint and how patient to be with it."""

    url: str
    """Up to `/v1`, or the whole address of `/chat/completions`."""
    model: str
    key: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0
    """Longest time for a request, from its start to the end of the reply."""
    max_retries: int = 6
    max_tokens: int = 2048
    stop: threading.Event = field(default_factory=threading.Event, repr=False)
    """Once set, no request is sent or repeated."""

    def __post_init__(self) -> None:
        """Check the address and the key."""
        self.url = _checked_url(self.url)
        # http.client would show a header that it does not accept.
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise ValueError(
                "the judge's key has characters that no header can have; set the variable that "
                "--judge-key-env names again, without line breaks."
            )
        self._settings = {"temperature": TEMPERATURE, "max_tokens": self.max_tokens}
        # A request to this very machine needs no proxy, and few proxies would deliver it.
        self._is_near = urlsplit(self.url).hostname in _LOOPBACK
        proxies = urllib.request.ProxyHandler({} if self._is_near else None)
        self._opener = urllib.request.build_opener(proxies, _NoRedirects())

    @property
    def shows_key(self) -> bool:
        """Whether the key goes through a network unencrypted."""
        return self.key is not None and self.url.startswith("http://") and not self._is_near

    def check_reachable(self) -> None:
        """See that something listens at the address, which costs nothing."""
        parts = urlsplit(self.url)
        if not self._is_near and urllib.request.getproxies().get(parts.scheme):
            return  # only the proxy reaches it
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            address = (parts.hostname or "", port)
            socket.create_connection(address, timeout=min(self.timeout_s, 20.0)).close()
        except OSError as error:
            raise JudgeUnavailable(
                f"nothing answers at --judge-url {self.url} ({error}); start the judge or check "
                "the address. --no-judge only answers, and the same command without it judges "
                "those answers later."
            ) from error

    def ask(self, prompt: Prompt) -> Reply:
        """Return the judge's reply to one prompt, or raise one of this module's three errors."""
        for attempt in range(self.max_retries + 1):
            if self.stop.is_set():
                raise JudgeStopped
            try:
                return self._ask_once(prompt)
            except _Transient as failure:
                problem = self._clean(str(failure))
                if failure.is_final or attempt == self.max_retries:
                    break
                self.stop.wait(_delay(attempt, failure.retry_after_s))
        tries = f" ({attempt + 1} tries)" if attempt else ""
        raise JudgeUnavailable(f"the judge at {self.url} gives no answer{tries}: {problem}")

    def _ask_once(self, prompt: Prompt) -> Reply:
        settings = dict(self._settings)
        try:
            raw = self._post(prompt, settings)
        except RequestRefused as refusal:
            if not self._learn(settings, str(refusal)):
                raise
            return self._ask_once(prompt)  # at most twice: each time one field less is disputed
        return self._read_reply(raw, settings.get("temperature"))

    def _learn(self, sent: dict[str, float], refusal: str) -> bool:
        """See whether a refusal is about what was sent, so that it is sent otherwise from now on.

        OpenAI's reasoning models know `max_completion_tokens` where everybody else knows
        `max_tokens`, and choose their temperature themselves. They say so when they refuse a
        request, which costs nothing. Several threads may learn the same; each asks about what it
        has sent.
        """
        settings = dict(self._settings)
        if "support" not in refusal.lower():
            return False
        if "max_tokens" in sent and "max_completion_tokens" in refusal:
            settings.pop("max_tokens", None)
            settings["max_completion_tokens"] = sent["max_tokens"]
        elif "temperature" in sent and "temperature" in refusal:
            settings.pop("temperature", None)
        else:
            return False
        self._settings = settings
        return True

    def _post(self, prompt: Prompt, settings: dict[str, float]) -> bytes:
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
                return _read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._failure(error) from None
        except TimeoutError:
            raise _Transient(f"no reply within {self.timeout_s:g} s") from None
        except (HTTPException, OSError) as error:
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

    def _read_reply(self, raw: bytes, temperature: float | None) -> Reply:
        def text_or_none(value: Any) -> str | None:
            return self._without_key(value) if isinstance(value, str) else None

        try:
            parsed = json.loads(raw)
            choice = parsed["choices"][0]
            text = choice["message"]["content"]
            usage = parsed.get("usage") or {}
            counts = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
            if not isinstance(text, str | None):
                raise TypeError
            return Reply(
                text=text_or_none(text) or "",
                model=text_or_none(parsed.get("model")),
                finish_reason=text_or_none(choice.get("finish_reason")),
                usage={name: count for name, count in counts.items() if isinstance(count, int)},
                temperature=temperature,
            )
        except _MALFORMED:
            start = self._without_key(raw.decode(errors="replace"))[:100]
            raise _Transient(f"something else than an OpenAI-compatible reply: {start!r}") from None

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text

    def _clean(self, text: str) -> str:
        text = "".join(c if c.isprintable() else " " for c in self._without_key(text))
        return " ".join(text.split())[:300]


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key would go along to wherever it points."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _checked_url(url: str) -> str:
    """Return where requests go; the address is shown and saved, so it must hold no secret."""
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


def _read(response: HTTPResponse, deadline: float) -> bytes:
    """Read a reply; the socket's own timeout starts anew with every byte."""
    raw = b""
    while part := response.read1(2**16):
        raw += part
        if len(raw) > _MAX_REPLY_BYTES:
            raise _Transient(f"a reply of more than {_MAX_REPLY_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    if response.length:
        raise _Transient(f"the reply breaks off, {response.length} bytes before its end")
    return raw


def _error_text(error: urllib.error.HTTPError) -> str:
    try:
        raw = error.read(2**16).decode(errors="replace")
    except (OSError, HTTPException):
        return str(error.reason)
    try:
        found = json.loads(raw)["error"]
        known = [str(found[key]) for key in ("message", "code") if found.get(key)]
        return " ".join(known) or str(error.reason)
    except _MALFORMED:
        return raw or str(error.reason)


def _retry_after(headers: Message) -> float | None:
    """Return the seconds that a reply asks to wait for, given as such or as a date."""
    text = headers.get("Retry-After", "").strip()
    for read in (float, lambda date: parsedate_to_datetime(date).timestamp() - time.time()):
        try:
            return max(0.0, read(text))
        except ValueError:
            continue
    return None


def _delay(attempt: int, retry_after_s: float | None) -> float:
    """Return seconds to wait: twice as long each time, spread so that threads do not march."""
    wait_s: float = min(_FIRST_WAIT_S * 2**attempt, _LONGEST_WAIT_S)
    if retry_after_s is None:
        return wait_s * random.uniform(0.5, 1.0)
    return retry_after_s + wait_s * random.uniform(0.0, 0.5)
