"""Uploading a finished run, by a client of the hub that keeps what it would send."""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects

from pacatune.cli import main
from pacatune.training import train
from tests.training.launching import save_config

ADDRESS = "http://127.0.0.1/me/adapter"


@pytest.fixture
def hub():
    """What is called of the client, with the arguments that it takes."""

    def upload_folder(api, *, folder_path, ignore_patterns, **kwargs):
        names = [path.relative_to(folder_path) for path in folder_path.rglob("*") if path.is_file()]
        api.uploaded = {*filter_repo_objects(map(str, names), ignore_patterns=ignore_patterns)}
        return SimpleNamespace(repo_url=SimpleNamespace(url=ADDRESS))

    with (
        patch.object(HfApi, "create_repo", autospec=True) as create,
        patch.object(HfApi, "upload_folder", autospec=True, side_effect=upload_folder) as upload,
    ):
        create.return_value.repo_id = "me/adapter"
        yield SimpleNamespace(create=create, upload=upload)


def run_of(make_config, **training):
    return make_config(training={"max_steps": 2, "eval_strategy": "no", **training})


def test_the_finished_folder_is_uploaded(hub, make_config, tmp_path, capsys):
    config = run_of(make_config, hub_private_repo=True)
    save_config(config, tmp_path / "run.yaml")
    words = ["train", "--config", str(tmp_path / "run.yaml"), "--push_to_hub", "adapter"]
    assert main([*words, "--training.hub_token", "hf_mine"]) == 0
    assert f"uploaded to {ADDRESS}" in capsys.readouterr().out
    (api, name), options = hub.create.call_args
    assert (api.token, name, options) == ("hf_mine", "adapter", {"private": True, "exist_ok": True})
    ((api,), options) = hub.upload.call_args
    assert (api.token, options["repo_id"]) == ("hf_mine", "me/adapter")
    kept = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "report.json"} <= kept
    assert api.uploaded == kept
    assert (tmp_path / "out/checkpoint-2").is_dir()


def test_nothing_is_uploaded_unless_asked(hub, make_config, console):
    train(run_of(make_config), console=console)
    assert not hub.create.called
    assert not hub.upload.called


def test_what_fails(hub, make_config, tmp_path, console):
    """A repository before training, and an upload when the result is there."""
    hub.create.side_effect = RuntimeError("403")
    message = (
        r"`--push_to_hub` \('a/b'\): .* neither be found nor created \(RuntimeError: 403\); give"
    )
    with pytest.raises(ConnectionError, match=message):
        train(run_of(make_config), push_to_hub="a/b", console=console)
    assert not (tmp_path / "out").exists()
    hub.create.side_effect, hub.upload.side_effect = None, RuntimeError("403")
    with pytest.raises(ConnectionError, match=r"the result is in .*out, but uploading it failed"):
        train(run_of(make_config), push_to_hub="me/adapter", console=console)
    assert (tmp_path / "out/report.json").exists()
