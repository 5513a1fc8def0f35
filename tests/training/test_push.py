"""Uploading a finished run, to a server that answers as the hub does."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest

from pacatune.cli import main
from pacatune.training import train
from tests.training.launching import save_config


class Hub(ThreadingHTTPServer):
    """Takes repositories and commits, and keeps what it was sent."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.created, self.files, self.tokens, self.refuses = [], {}, set(), None


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        """Stay silent."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub = self.server
        hub.tokens.add(self.headers.get("Authorization"))
        url = f"http://127.0.0.1:{hub.server_port}/me/adapter"
        if hub.refuses is not None and hub.refuses in self.path:
            self.answer({"error": "You may not write here."}, status=403)
        elif self.path.endswith("/repos/create"):
            hub.created.append(json.loads(body))
            self.answer({"url": url, "name": "me/adapter", "id": "1"})
        elif "/preupload/" in self.path:
            files = [{**f, "uploadMode": "regular"} for f in json.loads(body)["files"]]
            self.answer({"files": [{**f, "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    hub.files[value["path"]] = base64.b64decode(value["content"])
            self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": f"{url}/commit/1"})
        else:
            self.answer({"errors": [], "warnings": []})

    def answer(self, values, status=200):
        data = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def run_of(make_config, **training):
    return make_config(training={"max_steps": 2, "eval_strategy": "no", **training})


def test_the_finished_folder_is_uploaded(hub, make_config, tmp_path, capsys):
    config = run_of(make_config, hub_private_repo=True)
    save_config(config, tmp_path / "run.yaml")
    words = ["train", "--config", str(tmp_path / "run.yaml"), "--push_to_hub", "me/adapter"]
    assert main(words) == 0
    assert "uploaded to http://127.0.0.1" in capsys.readouterr().out
    assert hub.created[0].get("visibility", hub.created[0].get("private")) in ("private", True)
    assert hub.tokens == {"Bearer hf_mine"}
    out = tmp_path / "out"
    kept = {path.name for path in out.iterdir() if path.is_file()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "report.json"} <= kept
    assert hub.files == {name: (out / name).read_bytes() for name in kept}
    assert (out / "checkpoint-2").is_dir()


def test_nothing_is_uploaded_unless_asked(hub, make_config, console):
    train(run_of(make_config), console=console)
    assert not hub.created
    with pytest.raises(ValueError, match=r"`training.hub_model_id` \('a/b'\) is not offered: give"):
        make_config(training={"hub_model_id": "a/b"})


def test_what_is_wrong_is_found_before_training(hub, make_config, tmp_path, console, monkeypatch):
    config = run_of(make_config)
    with pytest.raises(ConnectionError, match=r"`--push_to_hub` \('a/b/c'\).*; give ORGANISATION/"):
        train(config, push_to_hub="a/b/c", console=console)
    hub.refuses = "/repos/create"
    with pytest.raises(ConnectionError, match=r"can neither be found nor created \(.*403"):
        train(config, push_to_hub="me/adapter", console=console)
    assert not (tmp_path / "out").exists()


def test_a_failed_upload_says_where_the_result_is(hub, make_config, tmp_path, console):
    hub.refuses = "/commit/"
    with pytest.raises(ConnectionError, match=r"the result is in .*out, but uploading it failed"):
        train(run_of(make_config), push_to_hub="me/adapter", console=console)
    assert (tmp_path / "out" / "report.json").exists()
