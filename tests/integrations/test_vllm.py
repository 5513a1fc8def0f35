"""The trainer's end, which needs no vLLM; what is inside vLLM is in tests/vllm."""

import contextlib
import importlib
import json
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from pacatune.integrations.vllm import VllmTransport


class Answer(BaseHTTPRequestHandler):
    """A server whose one answer is given by the test."""

    status, body = 200, b"{}"
    asked: list

    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path, json.loads(data)))
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """Serve in a thread; return the address and what is asked."""
    with contextlib.ExitStack() as stack:

        def start(status=200, body=b"{}"):
            values = {"status": status, "body": body, "asked": []}
            server = HTTPServer(("127.0.0.1", 0), type("One", (Answer,), values))
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            for end in (thread.join, server.server_close, server.shutdown):
                stack.callback(end)
            return f"http://127.0.0.1:{server.server_port}", values["asked"]

        yield start


def test_nothing_of_vllm_is_imported():
    code = (
        "import sys; import pacatune.integrations.vllm; "
        "assert not {'vllm', 'trl', 'peft'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_vllm_finds_the_plugin():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["pacatune"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_a_server_is_asked_in_order(serve):
    address, asked = serve()
    transport = VllmTransport(address + "/")
    transport.revert()
    assert [path for path, _ in asked] == [
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
    ]
    assert asked[2][1] == {"update_info": {"kind": "revert"}}
    with pytest.raises(ValueError, match="this end sends"):
        transport.receive()


NO_ENGINE = SimpleNamespace(vllm_config=SimpleNamespace(weight_transfer_config=None))
BOTH = {"folder": "here", "broadcast": ("127.0.0.1", 1)}


@pytest.mark.parametrize(
    ("vllm", "options", "error", "message"),
    [
        ((404,), {}, ConnectionError, "VLLM_SERVER_DEV_MODE=1"),
        ((500, b"none"), {}, RuntimeError, r"500: none.*--weight-transfer-config"),
        ("http://127.0.0.1:9", {"timeout": 5}, ConnectionError, "does not answer"),
        ("http://127.0.0.1:9", BOTH, ValueError, "exclude each other"),
        (SimpleNamespace(llm_engine=NO_ENGINE), {}, ConnectionError, r'\{"backend": "pacatune"\}'),
    ],
)
def test_what_is_refused(serve, vllm, options, error, message):
    given = serve(*vllm)[0] if isinstance(vllm, tuple) else vllm
    with pytest.raises(error, match=message):
        VllmTransport(given, **options)
