"""Uploading a finished run, to a hub that keeps what huggingface_hub would send."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.cli import hf
from huggingface_hub.utils import filter_repo_objects

from pacatune.cli import main
from pacatune.training import train
from tests.training.launching import save_config
from tests.training.runs import interrupt, stop_at

URL = "https://huggingface.co/me/adapter"


@pytest.fixture
def hub(monkeypatch):
    """What repositories are created and what files are sent, unless `refuses` names the call."""
    hub = SimpleNamespace(created=[], files={}, refuses=None)

    def create_repo(self, repo_id, *, private, exist_ok, **options):
        if hub.refuses == "create_repo":
            raise PermissionError("403: you may not write here")
        hub.created.append((repo_id, self.token, private, exist_ok))
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **options):
        if hub.refuses == "create_commit":
            raise PermissionError("403: you may not write here")
        for operation in operations:
            with operation.as_file() as file:
                hub.files[operation.path_in_repo] = file.read()
        return CommitInfo(f"{URL}/commit/1", "Upload", "", "1" * 40)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)

    def upload_folder(self, *, folder_path, allow_patterns, **options):
        """What `hf upload` calls, which asks the hub how to send each file."""
        folder = Path(folder_path)
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            hub.files[name] = (folder / name).read_bytes()
        return CommitInfo(f"{URL}/commit/1", "Upload", "", "1" * 40)

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return hub


def run_of(make_config, **training):
    return make_config(training={"max_steps": 2, "eval_strategy": "no", **training})


def test_the_finished_folder_is_uploaded(hub, make_config, tmp_path, capsys):
    config = run_of(make_config, hub_private_repo=True, hub_token="hf_mine")
    save_config(config, tmp_path / "run.yaml")
    words = ["train", "--config", str(tmp_path / "run.yaml"), "--training.hub_token", "hf_mine"]
    assert main([*words, "--push_to_hub", "me/adapter"]) == 0
    assert f"uploaded to {URL}" in capsys.readouterr().out
    assert hub.created == [("me/adapter", "hf_mine", True, True)]
    out = tmp_path / "out"
    kept = {path.name for path in out.iterdir() if path.is_file()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "report.json"} <= kept
    assert hub.files.keys() == kept - {"config.yaml"}
    assert (out / "checkpoint-2").is_dir()
    for name, content in hub.files.items():
        if name != "adapter_config.json":
            assert content == (out / name).read_bytes()
        assert b"/popen-gw" not in content, name
        assert str(tmp_path).encode() not in content, name
    base = Path(config.model.path)
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.base_model is None  # a path is refused there
    assert f"from_pretrained('{base.name}')" in card.text
    adapter, local = hub.files["adapter_config.json"], (out / "adapter_config.json").read_text()
    assert json.loads(adapter)["base_model_name_or_path"] == base.name
    assert json.loads(local)["base_model_name_or_path"] == str(base)


def test_the_configuration_is_uploaded_where_that_is_said(hub, make_config, tmp_path, console):
    how = {"push_to_hub": "me/adapter", "push_config": True, "console": console}
    train(run_of(make_config), **how)
    assert hub.files["config.yaml"] == (tmp_path / "out" / "config.yaml").read_bytes()


def test_only_what_the_run_wrote_is_uploaded(hub, make_config, tmp_path, console, monkeypatch):
    """Files of the user's stay here: those that were there, and those that appear meanwhile."""
    out = tmp_path / "out"
    config = run_of(make_config, save_steps=1, max_steps=3)
    interrupt(config, monkeypatch, 2)
    (out / ".env").write_text("HF_TOKEN=hf_mine\n")
    (out / "notes").mkdir()
    (out / "notes" / "try.ipynb").write_text("{}")
    stop_at(monkeypatch, 3, lambda: (out / "nohup.out").write_text("step 3\n"))
    train(config, resume=True, push_to_hub="me/adapter", console=console)
    assert (out / "nohup.out").is_file()
    assert hub.files.keys() == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "loss.png",
        "pacatune.json",
        "report.json",
        "report.md",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_what_is_wrong_is_found_before_training(hub, make_config, tmp_path, console):
    hub.refuses = "create_repo"
    message = r"`--push_to_hub` \('a/b'\).* can neither be found nor created \(.*403.*; give ORGAN"
    with pytest.raises(ConnectionError, match=message):
        train(run_of(make_config), push_to_hub="a/b", console=console)
    assert not (tmp_path / "out").exists()


def test_a_failed_upload_says_where_the_result_is(hub, make_config, tmp_path, console):
    hub.refuses = "create_commit"
    message = r"the result is in .*out, but uploading it failed .*`(hf upload .*)`"
    with pytest.raises(ConnectionError, match=message) as failed:
        train(run_of(make_config), push_to_hub="me/adapter", console=console)
    out = tmp_path / "out"
    assert (out / "report.json").exists()
    (out / ".env").write_text("HF_TOKEN=hf_mine\n")
    hub.refuses = None
    command = re.search(message, str(failed.value))[1]
    hf.app(shlex.split(command)[1:], standalone_mode=False)
    assert hub.files.keys() >= {"README.md", "adapter_model.safetensors", "loss.png"}
    assert not hub.files.keys() & {".env", "config.yaml"}
    assert not any(name.startswith(("checkpoint-", ".pacatune")) for name in hub.files)
