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

# FastChat's four prompts of single-answer grading show a conversation in these frames.
ONE_TURN = ("[Question]", "[The Start of Assistant's Answer]", "[The End of Assistant's Answer]")
ONE_REFERENCE = ("[The Start of Reference Answer]", "[The End of Reference Answer]")
TWO_TURNS = "<|The Start of Assistant A's Conversation with User|>"
TWO_REFERENCES = "<|The Start of Reference Answer|>"


@dataclass
class State:
    """What the server has seen and what it does next."""

    model: str = "judge"
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
    most_at_once: int = 0
    _at_once: int = 0
    lock: object = field(default_factory=threading.Lock)

    @contextmanager
    def counted(self):
        with self.lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self.lock:
                self._at_once -= 1


def rating_of(prompt):
    """Some rating from 1 to 10, always the same for one prompt."""
    return 1 + int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10


def complaints_about(body, state):
    """Whatever is wrong with a request."""
    wrong = []
    settings = {name: value for name, value in body.items() if name != "messages"}
    expected = {"model": state.model, "temperature": 0, "max_tokens": state.max_tokens}
    if state.reasons:
        expected = {"model": state.model, "max_completion_tokens": state.max_tokens}
    if settings != expected:
        wrong.append(f"settings {settings}")
    roles = [message["role"] for message in body["messages"]]
    if roles != ["system", "user"]:
        return [*wrong, f"roles {roles}"]
    system, user = (message["content"] for message in body["messages"])
    if TWO_TURNS in user:
        if "second" not in system or "[[rating]]" not in system:
            wrong.append("the system prompt of two turns does not say what to do")
        if user.count("### User:\n") != (4 if TWO_REFERENCES in user else 2):
            wrong.append("not both turns")
        if user.count("### Assistant A:\n") != 2:
            wrong.append("not both answers")
    else:
        if "[[rating]]" not in user or not all(mark in user for mark in ONE_TURN):
            wrong.append("the prompt of one turn lacks a part")
        if ("[The Start of Reference" in user) != all(mark in user for mark in ONE_REFERENCE):
            wrong.append("half a reference")
    if re.search(r"\{(question|answer|ref_answer)", user):
        wrong.append("a place was not filled")
    return wrong


def reasoner_refuses(body):
    """The errors of OpenAI's reasoning models, one at a time."""
    if "max_tokens" in body:
        text = (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
            "'max_completion_tokens' instead."
        )
        return {"message": text, "param": "max_tokens", "code": "unsupported_parameter"}
    if "temperature" in body:
        text = (
            "Unsupported value: 'temperature' does not support 0 with this model. Only the "
            "default (1) value is supported."
        )
        return {"message": text, "param": "temperature", "code": "unsupported_value"}
    return None


def make_handler(state):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_POST(self):
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            body = json.loads(raw)
            with state.lock:
                state.requests.append((dict(self.headers), body))
                misdeed = state.misdeeds.popleft() if state.misdeeds else "none"
            with state.counted():  # before the reply, after which the next request comes
                time.sleep(state.delay_s)
            if state.reasons and (refusal := reasoner_refuses(body)):
                return self._send(400, {"error": refusal})
            wrong = complaints_about(body, state)
            if self.path != "/v1/chat/completions":
                wrong.append(f"path {self.path}")
            if state.key is not None and self.headers["Authorization"] != f"Bearer {state.key}":
                # What some endpoints do: show what they were given.
                given = self.headers["Authorization"]
                return self._send(401, {"error": {"message": f"no such key: {given}"}})
            if wrong:
                state.complaints.extend(wrong)
                return self._send(400, {"error": {"message": "; ".join(wrong)}})
            return self._misbehave(misdeed, body)

        def _misbehave(self, misdeed, body):
            prompt = body["messages"][1]["content"]
            rating = (state.rate or rating_of)(prompt)
            text = f"A judge's reasons: it is so so.\n\nRating: [[{rating}]]"
            if isinstance(misdeed, tuple):  # (status, headers, error)
                status, headers, error = misdeed
                return self._send(status, {"error": error}, headers)
            if misdeed == "hang":
                time.sleep(2)
                return None
            if misdeed == "cut":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                self.close_connection = True
                return None
            if misdeed == "html":
                return self._send(200, "<html>Welcome</html>")
            texts = {
                "nonsense": "I would rather talk about the weather.",
                "eleven": "Splendid. Rating: [[11]]",
                "silent": None,
                "long": "To begin with, let me say",
                "leak": f"I was given {self.headers['Authorization']}. [[7]]",
            }
            ended = "length" if misdeed == "long" else "stop"
            return self._send(200, self._completion(texts.get(misdeed, text), ended))

        def _completion(self, text, finish_reason):
            return {
                "object": "chat.completion",
                "model": f"{state.model}-2026-01-01",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": text},
                        "finish_reason": finish_reason,
                    }
                ],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
            }

        def _send(self, status, content, headers=()):
            raw = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

    return Handler


@contextmanager
def judge_server(state, port=0):
    """Serve inside the block; yield the URL."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request, client_address):
            pass  # a client that left early

    server = Server(("127.0.0.1", port), make_handler(state))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
