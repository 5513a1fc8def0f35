"""Uploading a finished run, by a hub that keeps what it is sent."""

from types import SimpleNamespace
from unittest import mock

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects

from pacatune.cli import main
from pacatune.training import train
from tests.training.launching import save_config
from tests.training.runs import QUIET, refused


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the client's two calls, whose arguments must be those that it has."""
    seen = SimpleNamespace(created=[], files={}, tokens=set(), refuses=None)

    def create(api, repo_id, *, private, exist_ok):
        if seen.refuses == "create":
            raise OSError("403: you may not write here")
        seen.created.append((repo_id, private))
        seen.tokens.add(api.token)
        return SimpleNamespace(repo_id=repo_id)

    def upload(api, *, folder_path, ignore_patterns, **options):
        if seen.refuses == "upload":
            raise OSError("403: you may not write here")
        files = {str(p.relative_to(folder_path)): p for p in folder_path.rglob("*") if p.is_file()}
        for name in filter_repo_objects(files, ignore_patterns=ignore_patterns):
            seen.files[name] = files[name].read_bytes()
        url = f"https://hub/{options['repo_id']}"
        return SimpleNamespace(repo_url=SimpleNamespace(url=url))

    for name, stand_in in (("create_repo", create), ("upload_folder", upload)):
        spec = mock.create_autospec(getattr(HfApi, name), side_effect=stand_in)
        monkeypatch.setattr(HfApi, name, spec)
    return seen


def run_of(make_config, **training):
    return make_config(training={"max_steps": 2, "eval_strategy": "no", **training})


def test_the_finished_folder_is_uploaded(hub, make_config, tmp_path, capsys):
    config = run_of(make_config, hub_private_repo=True)
    save_config(config, tmp_path / "run.yaml")
    words = ["train", "--config", str(tmp_path / "run.yaml"), "--push_to_hub", "me/adapter"]
    words += ["--training.hub_token", "hf_mine"]
    assert main(words) == 0
    assert "uploaded to https://hub/me/adapter" in capsys.readouterr().out
    assert hub.created == [("me/adapter", True)]
    assert hub.tokens == {"hf_mine"}
    out = tmp_path / "out"
    kept = {path.name for path in out.iterdir() if path.is_file()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "report.json"} <= kept
    assert hub.files == {name: (out / name).read_bytes() for name in kept}
    assert (out / "checkpoint-2").is_dir()


def test_uploads_that_fail_say_where_the_result_is(hub, make_config, tmp_path):
    config = run_of(make_config)
    hub.refuses = "create"
    message = r"\('me/adapter'\).*neither be found nor created \(.*403.*; give ORGANISATION/NAME"
    refused(message, config, push_to_hub="me/adapter")
    assert not (tmp_path / "out").exists()
    hub.refuses = "upload"
    message = r"the result is in .*out, but uploading it failed"
    refused(message, config, push_to_hub="me/adapter")
    assert (tmp_path / "out" / "report.json").exists()
    hub.created.clear()  # and nothing is uploaded unless asked
    train(config, overwrite=True, console=QUIET)
    assert not hub.created
