"""Uploading a finished run, to a hub that keeps what huggingface_hub would send."""

from types import SimpleNamespace

import pytest
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.utils import filter_repo_objects

from pacatune.cli import main
from pacatune.training import train
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

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, **options):
        if hub.refuses == "upload_folder":
            raise PermissionError("403: you may not write here")
        names = [str(f.relative_to(folder_path)) for f in folder_path.rglob("*") if f.is_file()]
        for name in filter_repo_objects(names, ignore_patterns=ignore_patterns):
            hub.files[name] = (folder_path / name).read_bytes()
        return CommitInfo(f"{URL}/commit/1", "Upload", "", "1" * 40)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
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
    assert hub.files == {name: (out / name).read_bytes() for name in kept}
    assert (out / "checkpoint-2").is_dir()


def test_nothing_is_uploaded_unless_asked(hub, make_config, console):
    train(run_of(make_config), console=console)
    assert not hub.created


def test_what_is_wrong_is_found_before_training(hub, make_config, tmp_path, console):
    hub.refuses = "create_repo"
    message = r"`--push_to_hub` \('a/b'\).* can neither be found nor created \(.*403.*; give ORGAN"
    with pytest.raises(ConnectionError, match=message):
        train(run_of(make_config), push_to_hub="a/b", console=console)
    assert not (tmp_path / "out").exists()


def test_a_failed_upload_says_where_the_result_is(hub, make_config, tmp_path, console):
    hub.refuses = "upload_folder"
    with pytest.raises(ConnectionError, match=r"the result is in .*out, but uploading it failed"):
        train(run_of(make_config), push_to_hub="me/adapter", console=console)
    assert (tmp_path / "out" / "report.json").exists()
