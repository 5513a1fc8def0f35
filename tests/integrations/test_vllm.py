"""The trainer's end, which needs no vLLM; what is inside vLLM is in tests/vllm."""

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
    servers = []

    def start(status=200, body=b"{}"):
        asked = []
        handler = type("One", (Answer,), {"status": status, "body": body, "asked": asked})
        server = HTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}", asked

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


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
    VllmTransport(address + "/").revert()
    assert [path for path, _ in asked] == [
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
    ]
    assert asked[2][1] == {"update_info": {"kind": "revert"}}


def test_a_server_without_development_endpoints(serve):
    address, _ = serve(status=404)
    with pytest.raises(ConnectionError, match="VLLM_SERVER_DEV_MODE=1"):
        VllmTransport(address)


def test_a_server_that_fails_is_quoted(serve):
    address, _ = serve(status=500, body=b"no such engine")
    with pytest.raises(RuntimeError, match=r"500: no such engine.*--weight-transfer-config"):
        VllmTransport(address)


def test_no_server(serve):
    with pytest.raises(ConnectionError, match="does not answer"):
        VllmTransport("http://127.0.0.1:9", timeout=5)


def test_an_llm_with_another_engine():
    config = SimpleNamespace(weight_transfer_config=None)
    with pytest.raises(ConnectionError, match=r'\{"backend": "pacatune"\}'):
        VllmTransport(SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config)))


def test_ways_exclude_each_other():
    with pytest.raises(ValueError, match="exclude each other"):
        VllmTransport("http://127.0.0.1:9", folder="here", broadcast=("127.0.0.1", 1))


def test_it_does_not_receive(serve):
    address, _ = serve()
    transport = VllmTransport(address)
    with pytest.raises(ValueError, match="this end sends"):
        transport.receive()
