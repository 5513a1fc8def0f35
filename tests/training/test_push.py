"""Uploading a finished run, to a hub that keeps what huggingface_hub would send."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import CommitInfo, HfApi, ModelCard

from pacatune.cli import main
from pacatune.training import train
from pacatune.training.report import card_front
from pacatune.training.task import task_of
from tests.training.launching import save_config

URL = "https://huggingface.co/me/adapter"


@pytest.fixture
def hub(monkeypatch):
    """What repositories are created and what files are sent, unless `refuses` names the call."""
    hub = SimpleNamespace(created=[], files={}, refuses=None)

    def create_repo(self, repo_id, *, private, exist_ok):
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
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
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


def test_a_card_that_the_hub_would_refuse(hub, make_config, tmp_path, console, monkeypatch):
    config = run_of(make_config)
    task = task_of(config)
    assert task.prepared.pipeline_tag == "text-generation"  # looks at the model
    task.config.model.path = "a--b/c"  # as refused as a path is
    with pytest.raises(ValueError, match=r"a--b/c"):
        card_front(task, "a--b/c")

    def refuse(task, model):
        raise ValueError("base_model")

    monkeypatch.setattr("pacatune.training.recipe.card_front", refuse)
    with pytest.raises(ValueError, match="base_model"):
        train(run_of(make_config), push_to_hub="me/adapter", console=console)
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_found_before_training(hub, make_config, tmp_path, console):
    hub.refuses = "create_repo"
    message = r"`--push_to_hub` \('a/b'\).* can neither be found nor created \(.*403.*; give ORGAN"
    with pytest.raises(ConnectionError, match=message):
        train(run_of(make_config), push_to_hub="a/b", console=console)
    assert not (tmp_path / "out").exists()


def test_a_failed_upload_says_where_the_result_is(hub, make_config, tmp_path, console):
    hub.refuses = "create_commit"
    with pytest.raises(ConnectionError, match=r"the result is in .*out, but uploading it failed"):
        train(run_of(make_config), push_to_hub="me/adapter", console=console)
    assert (tmp_path / "out" / "report.json").exists()
