"""A judge that checks what it is asked, and misbehaves when told to.

openai's client asks it without a network; its ratings are made of the prompt's hash.
"""

import hashlib
import json
import re
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import httpx2

URL = "http://judge.test/v1"
TEXTS = {
    "nonsense": "I would rather talk about the weather.",
    "eleven": "Splendid. Rating: [[11]]",
    "silent": None,
    "long": "To begin with, let me say",
    "leak": "I was given {key}. [[7]]",
}
BROKEN = {
    "hang": httpx2.ReadTimeout("too late"),
    "cut": httpx2.RemoteProtocolError("cut off"),
    "gone": httpx2.ConnectError("nobody there"),
}


@dataclass
class FakeJudge:
    """What it has seen and what it does next."""

    key: str | None = None
    misdeeds: deque = field(default_factory=deque)
    """Faults, one for each of the next requests; afterwards it behaves."""
    delay_s: float = 0.0
    requests: list = field(default_factory=list)
    complaints: list = field(default_factory=list)
    rate: object = None
    """prompt -> rating."""
    reasons: bool = False
    """Whether it is like OpenAI's reasoning models."""
    max_tokens: int = 2048
    at_once: int = 0
    most_at_once: int = 0
    lock: object = field(default_factory=threading.Lock)

    def answer(self, request):
        body = json.loads(request.content)
        with self.lock:
            self.requests.append((request.headers, body))
            misdeed = self.misdeeds.popleft() if self.misdeeds else "none"
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.delay_s)
        with self.lock:
            self.at_once -= 1
        if self.reasons and (refusal := reasoner_refuses(body)):
            return httpx2.Response(400, json={"error": refusal})
        given = request.headers["Authorization"]
        if self.key is not None and given != f"Bearer {self.key}":
            # What some endpoints do: show what they were given.
            return httpx2.Response(401, json={"error": {"message": f"no such key: {given}"}})
        wrong = complaints_about(body, self)
        if str(request.url) != f"{URL}/chat/completions":
            wrong.append(f"address {request.url}")
        if wrong:
            self.complaints.extend(wrong)
            return httpx2.Response(400, json={"error": {"message": "; ".join(wrong)}})
        return self._reply(misdeed, body["messages"][1]["content"], given)

    def _reply(self, misdeed, prompt, key):
        if isinstance(misdeed, tuple):  # (status, error)
            return httpx2.Response(misdeed[0], json={"error": misdeed[1]})
        if misdeed in BROKEN:
            raise BROKEN[misdeed]
        if misdeed == "html":
            return httpx2.Response(200, text="<html>Welcome</html>")
        rating = (self.rate or rating_of)(prompt)
        text = TEXTS.get(misdeed, f"A judge's reasons: it is so so.\n\nRating: [[{rating}]]")
        message = {"role": "assistant", "content": text and text.format(key=key)}
        ended = "length" if misdeed == "long" else "stop"
        choices = [{"index": 0, "message": message, "finish_reason": ended}]
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        names = {"object": "chat.completion", "model": "judge-2026-01-01"}
        return httpx2.Response(200, json={**names, "choices": choices, "usage": usage})


def rating_of(prompt):
    return 1 + int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10


def complaints_about(body, judge):
    settings = {name: value for name, value in body.items() if name != "messages"}
    expected = {"model": "judge", "temperature": 0, "max_tokens": judge.max_tokens}
    if judge.reasons:
        expected = {"model": "judge", "max_completion_tokens": judge.max_tokens}
    roles = [message["role"] for message in body["messages"]]
    if roles != ["system", "user"]:
        return [f"roles {roles}"]
    is_filled = not re.search(r"\{(question|answer|ref_answer)", body["messages"][1]["content"])
    checks = {f"settings {settings}": settings == expected, "a place was not filled": is_filled}
    return [problem for problem, is_fine in checks.items() if not is_fine]


def reasoner_refuses(body):
    """The errors of OpenAI's reasoning models, one at a time."""
    if "max_tokens" in body:
        text = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        return {"message": text, "param": "max_tokens", "code": "unsupported_parameter"}
    if "temperature" in body:
        text = "Unsupported value: 'temperature'. Only the default (1) value is supported."
        return {"message": text, "param": "temperature", "code": "unsupported_value"}
    return None
