"""Which runs are resumed, and from where."""

import shutil
import signal

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from pacatune.training import TrainingInterrupted, train
from tests.training.test_resume import stop_at


@pytest.fixture
def interrupted(make_config, tmp_path, monkeypatch):
    """A run of eight steps, stopped after the fifth."""
    config = make_config()
    with monkeypatch.context() as patch:
        stop_at(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(TrainingInterrupted):
            train(config, console=Console(quiet=True))
    return config


def test_resume_refuses_other_options(interrupted, make_config):
    from pacatune.training import PacaSection

    config = make_config(paca=PacaSection(r=8), training={"learning_rate": 1e-3})
    with pytest.raises(
        ValueError,
        match=r"other options.*\(paca.r: 16 -> 8; training.learning_rate: 0.005 -> 0.001\); "
        r"resume with `--config .*config.yaml`",
    ):
        train(config, resume=True)


def test_resume_allows_what_changes_no_number(interrupted, make_config, tmp_path):
    shutil.move(tmp_path / "out", tmp_path / "moved")
    training = {"output_dir": str(tmp_path / "moved"), "save_total_limit": 1}
    report = train(make_config(training=training), resume=True, console=Console(quiet=True))
    assert report.num_steps == 8
    assert [path.name for path in (tmp_path / "moved").glob("checkpoint-*")] == ["checkpoint-8"]


def test_resume_refuses_changed_data(interrupted, make_config, data_path, tmp_path):
    lines = data_path.read_text().splitlines()
    try:
        data_path.write_text("\n".join([*lines[:-1], lines[0]]))
        with pytest.raises(ValueError, match=r"the training data has changed since .*checkpoint-5"):
            train(make_config(), resume=True)
    finally:
        data_path.write_text("\n".join(lines) + "\n")


def test_resume_refuses_another_number_of_processes(interrupted, tmp_path):
    state = tmp_path / "out/checkpoint-5/trainer_state.json"
    text = state.read_text()
    assert text.count('"num_processes": 1') == 1
    state.write_text(text.replace('"num_processes": 1', '"num_processes": 2'))
    with pytest.raises(ValueError, match=r"checkpoint-5 was trained by 2 processes and cannot be "):
        train(interrupted, resume=True)


def test_resume_takes_the_last_complete_checkpoint(interrupted, tmp_path):
    state = tmp_path / "out/checkpoint-5/trainer_state.json"
    state.write_text(state.read_text()[:100])
    report = train(interrupted, resume=True, console=Console(quiet=True))
    assert report.num_steps == 8
    assert [step for step, _ in report.train_losses] == list(range(1, 9))


def test_resume_without_a_checkpoint(interrupted, tmp_path):
    for path in (tmp_path / "out").glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(ValueError, match="no complete checkpoint; start it again without --resume"):
        train(interrupted, resume=True)


def test_resume_of_a_finished_run(interrupted):
    train(interrupted, resume=True, console=Console(quiet=True))
    with pytest.raises(ValueError, match="out is finished; there is nothing to resume"):
        train(interrupted, resume=True)


def test_resume_of_a_run_that_only_lacks_its_result(make_config, tmp_path):
    """Killed after the last step, before the adapter was saved."""
    first = train(make_config(), console=Console(quiet=True))
    whole = load_file(tmp_path / "out/adapter_model.safetensors")
    for name in ("report.json", "adapter_model.safetensors"):
        (tmp_path / "out" / name).unlink()
    report = train(make_config(), resume=True, console=Console(quiet=True))
    again = load_file(tmp_path / "out/adapter_model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert report.train_losses == first.train_losses
    assert report.eval_loss_after == first.eval_loss_after
    assert report.step_ms is None


def test_resume_deletes_what_a_killed_save_left(interrupted, tmp_path):
    left = tmp_path / "out/.incomplete/checkpoint-6"
    left.mkdir(parents=True)
    (left / "garbage").touch()
    train(interrupted, resume=True, console=Console(quiet=True))
    assert not (tmp_path / "out/.incomplete").exists()
    assert not list((tmp_path / "out").rglob("garbage"))
