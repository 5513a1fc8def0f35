"""A judge on this machine that checks what it is asked, and misbehaves when told to.

It speaks OpenAI's protocol; its ratings are made of the prompt's hash.
"""

import hashlib
import json
import re
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TEXTS = {
    "nonsense": "I would rather talk about the weather.",
    "eleven": "Splendid. Rating: [[11]]",
    "silent": None,
    "long": "To begin with, let me say",
    "leak": "I was given {key}. [[7]]",
}


@dataclass
class State:
    """What the server has seen and what it does next."""

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

    def count(self, number):
        with self.lock:
            self.at_once += number
            self.most_at_once = max(self.most_at_once, self.at_once)


def rating_of(prompt):
    return 1 + int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10


def complaints_about(body, state):
    settings = {name: value for name, value in body.items() if name != "messages"}
    expected = {"model": "judge", "temperature": 0, "max_tokens": state.max_tokens}
    if state.reasons:
        expected = {"model": "judge", "max_completion_tokens": state.max_tokens}
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


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        state = self.server.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with state.lock:
            state.requests.append((dict(self.headers), body))
            misdeed = state.misdeeds.popleft() if state.misdeeds else "none"
        state.count(1)
        time.sleep(state.delay_s)
        state.count(-1)  # before the reply, after which the next request comes
        if state.reasons and (refusal := reasoner_refuses(body)):
            return self._send(400, {"error": refusal})
        given = self.headers["Authorization"]
        if state.key is not None and given != f"Bearer {state.key}":
            # What some endpoints do: show what they were given.
            return self._send(401, {"error": {"message": f"no such key: {given}"}})
        wrong = complaints_about(body, state)
        if self.path != "/v1/chat/completions":
            wrong.append(f"path {self.path}")
        if wrong:
            state.complaints.extend(wrong)
            return self._send(400, {"error": {"message": "; ".join(wrong)}})
        return self._reply(misdeed, body["messages"][1]["content"])

    def _reply(self, misdeed, prompt):
        if isinstance(misdeed, tuple):  # (status, error)
            status, error = misdeed
            return self._send(status, {"error": error})
        if misdeed == "hang":
            return time.sleep(2)
        if misdeed == "cut":
            self.close_connection = True
            return self._send(200, '{"choices": [', length=1000)
        if misdeed == "html":
            return self._send(200, "<html>Welcome</html>")
        rating = (self.server.state.rate or rating_of)(prompt)
        text = TEXTS.get(misdeed, f"A judge's reasons: it is so so.\n\nRating: [[{rating}]]")
        if text is not None:
            text = text.format(key=self.headers["Authorization"])
        message = {"role": "assistant", "content": text}
        ended = "length" if misdeed == "long" else "stop"
        choices = [{"index": 0, "message": message, "finish_reason": ended}]
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        names = {"object": "chat.completion", "model": "judge-2026-01-01"}
        return self._send(200, {**names, "choices": choices, "usage": usage})

    def _send(self, status, content, length=None):
        raw = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(raw)))
        self.end_headers()
        self.wfile.write(raw)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request, client_address):
        pass  # a client that left early


@contextmanager
def judge_server(state):
    server = Server(("127.0.0.1", 0), Handler)
    server.state = state
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
