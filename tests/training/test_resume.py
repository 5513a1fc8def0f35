"""Interrupted in any way and resumed, a run ends with the very bits of one that was not."""

import re
import shutil
import signal
from contextlib import nullcontext
from unittest.mock import Mock

import pytest

from pacatune.files import owned_folder
from pacatune.files.owned_folder import OwnedFolder
from pacatune.training import TrainingInterrupted, train
from pacatune.training.output import run_folder
from pacatune.training.recipe import start_or_resume
from pacatune.training.sft import TextTrainer
from pacatune.training.trainer import RunTrainer
from tests.full_disk import limited_files
from tests.training.runs import (
    ADAPTER,
    QUIET,
    assert_same_run,
    interrupt,
    refused,
    stop_at,
    write_rows,
)


def test_signal_saves_and_says_how_to_go_on(make_config, tmp_path, console, monkeypatch):
    config, place = make_config(), tmp_path / "out"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    said = interrupt(config, monkeypatch, 5, signal.SIGTERM, console)
    command = f"pacatune train --config {place}/config.yaml --resume"
    assert said == f"stopped at step 5 of 8; continue with `{command}`"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert "saving a checkpoint, then stopping" in console.file.getvalue()
    start_or_resume(config, console=console)  # the same command again
    assert f"resuming after step 5: {place / 'checkpoint-5'}" in console.file.getvalue()


TWO_EPOCHS = {"num_train_epochs": 2, "max_steps": -1, "eval_steps": 4}


@pytest.mark.parametrize(
    ("task", "method", "step", "saved", "training"),
    [
        ("sft", "paca", 10, 10, TWO_EPOCHS),
        ("sft", "lora_dropout", 5, 5, TWO_EPOCHS),  # random numbers in every step
        ("sft", "qpaca", 3, 3, {}),
        *((task, "paca", 3, 3, {}) for task in ("dpo", "kto", "reward")),
        # In the second epoch, whose order TRL would forget.
        ("grpo", "paca", 5, 5, TWO_EPOCHS),
        # In the middle of answers that are used for several steps.
        ("rloo", "paca", 3, 4, {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 5}),
        # The moments belong to the same parameters, of which a head's learn at another rate.
        ("classifier", "paca", 3, 3, {"head_learning_rate": 0.01, "eval_strategy": "no"}),
    ],
)
def test_every_kind_of_run(
    make_task_config,
    rewards_module,
    data_path,
    tmp_path,
    assert_resumes,
    task,
    method,
    step,
    saved,
    training,
):
    if method == "qpaca":
        pytest.importorskip("bitsandbytes")
    samples = task in ("grpo", "rloo")
    options = {"training": {"save_total_limit": 9, **training}}
    options["data"] = {} if task == "classifier" else {"eval_fraction": 0.8 if samples else 0.2}
    if task == "sft":
        options["data"]["path"] = str(data_path)
    if task == "classifier":
        rows = [{"text": f"It is {i}.", "label": i % 3} for i in range(60)]
        options["data"]["path"] = str(write_rows(tmp_path / "rows.jsonl", rows))
    said = assert_resumes(step, make_task_config, task, method, **options)
    assert (tmp_path / f"cut/checkpoint-{saved}").is_dir()
    assert ("yaml --reward my_rewards:short --resume" in said) == samples


def test_second_signal_stops_at_once(make_config, tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    stop_at(monkeypatch, 5, twice)
    # A shell starts background jobs with SIGINT ignored, and tests may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(make_config(), console=QUIET)
    signal.signal(signal.SIGINT, before)
    assert not isinstance(caught.value, TrainingInterrupted)
    assert not (tmp_path / "out" / "checkpoint-5").exists()


def test_overwrite_says_what_it_deletes_when_training_can_start(
    make_config, tmp_path, console, monkeypatch
):
    config = make_config(training={"max_steps": 2, "report_to": "tensorboard"})
    train(config, console=QUIET)
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with monkeypatch.context() as patch:
        fail = Mock(side_effect=ValueError("no memory for the weights"))
        patch.setattr("pacatune.training.language.Task.load_model", fail)
        refused("no memory for the weights", config, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    train(config, overwrite=True, console=console)
    said = " ".join(console.file.getvalue().split())
    names = "README.md, .*adapter_model.safetensors, .*checkpoint-2, config.yaml, .*runs, tokenizer"
    assert re.search(f"deleting from .*/out: {names}.* loss", said)


# The adapter has 33 kB, the state of the optimizer 70 kB.
@pytest.mark.parametrize("limit", [20_000, 60_000])
def test_a_full_disk_keeps_the_previous_checkpoint(make_config, tmp_path, monkeypatch, limit):
    """Full at the second checkpoint, by a real limit of file sizes."""
    plain = TextTrainer._save_checkpoint

    def save(self, *args):
        with limited_files(limit) if self.state.global_step == 4 else nullcontext():
            plain(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TextTrainer, "_save_checkpoint", save)
        kept = "checkpoint-2 is intact: make room, then continue with --resume."
        refused(f"could not write .*/checkpoint-4'.*{kept}", make_config())
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [".pacatune", "checkpoint-2", "config.yaml"]
    assert train(make_config(), resume=True, console=QUIET).num_steps == 8


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    return tmp_path_factory.mktemp("stopped") / "out"


@pytest.fixture
def interrupted(make_config, tmp_path, stopped, monkeypatch):
    """The folder of a run of eight steps, stopped after the fifth; it is trained once."""
    if not stopped.exists():
        interrupt(make_config(training={"output_dir": str(stopped)}), monkeypatch, 5)
    return shutil.copytree(stopped, tmp_path / "out")


def test_what_cannot_be_resumed(interrupted, make_config):
    config = make_config()
    changes = r"\(paca.r: 16 -> 8; training.learning_rate: 0.005 -> 0.001\); "
    message = rf"other options.*{changes}resume with `--config .*config.yaml`"
    other = make_config(paca={"r": 8}, training={"learning_rate": 1e-3})
    refused(message, other, resume=True)
    checkpoint = interrupted / "checkpoint-5"
    weights, state = checkpoint / ADAPTER, checkpoint / "trainer_state.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:4_000])
    refused(r"the weights of .*checkpoint-5 cannot be read", config, resume=True)
    weights.write_bytes(whole)
    saved = state.read_text()
    state.write_text(saved.replace("a run without FSDP2 or DeepSpeed", "DeepSpeed"))
    message = "checkpoint-5 was saved by DeepSpeed and cannot be continued by a run without FSDP2"
    refused(message, config, resume=True)
    for path in interrupted.glob("checkpoint-*"):
        shutil.rmtree(path)
    refused("no complete checkpoint; start it again without --resume", config, resume=True)


def test_data_that_was_moved(interrupted, make_config, data_path, tmp_path):
    """It is known by its digest, wherever it lies now; other data is refused there, too."""
    lines = data_path.read_text().splitlines()
    path = tmp_path / "elsewhere.jsonl"
    path.write_text("\n".join([*lines[:-1], lines[0]]))
    config = make_config(data={"path": str(path)})
    refused(r"the training data has changed since .*checkpoint-5", config, resume=True)
    shutil.copy(data_path, path)
    report = train(config, resume=True, console=QUIET)
    assert [step for step, _ in report.train_losses] == list(range(1, 9))


def test_resume_from_the_last_complete_checkpoint(interrupted, make_config, tmp_path):
    """In another place, with fewer checkpoints kept; what a killed save has left is deleted."""
    state = interrupted / "checkpoint-5/trainer_state.json"
    state.write_text(state.read_text()[:100])
    left = interrupted / ".pacatune/incomplete/checkpoint-6"
    left.mkdir(parents=True)
    (left / "garbage").touch()
    moved = shutil.move(interrupted, tmp_path / "moved")
    training = {"output_dir": str(moved), "save_total_limit": 1}
    report = train(make_config(training=training), resume=True, console=QUIET)
    assert [step for step, _ in report.train_losses] == list(range(1, 9))
    assert [path.name for path in moved.glob("checkpoint-*")] == ["checkpoint-8"]
    assert not (moved / ".pacatune/incomplete").exists()
    assert not list(moved.rglob("garbage"))


@pytest.fixture
def killed(monkeypatch, tmp_path):
    """Train; return the output folder as a kill would leave it, at each moment after a file."""
    taken, publish, append = [], OwnedFolder.publish, owned_folder.append_rows

    def snap(folder):
        taken.append(shutil.copytree(folder, tmp_path / f"killed-{len(taken)}", symlinks=True))

    def run(config, last):
        def published(self, source, name, **options):
            publish(self, source, name, **options)
            if name == last or taken:
                snap(self.path)

        def listed(path, rows):
            append(path, rows)
            if taken:  # named, but not in its place
                snap(path.parent.parent)

        with monkeypatch.context() as patch:
            patch.setattr(OwnedFolder, "publish", published)
            patch.setattr(owned_folder, "append_rows", listed)
            train(config, console=QUIET)
        assert (taken[-1] / "report.json").exists()
        return taken

    return run


def go_on(make_config, folder, training, monkeypatch, **options):
    """Resume what was killed, without a step more; return its report."""
    config = make_config(training={**training, "output_dir": str(folder)}, **options)
    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "training_step", lambda *_: pytest.fail("a step was trained"))
        report = train(config, resume=True, console=QUIET)
    assert run_folder(folder).foreign() == []
    return report


@pytest.mark.parametrize("steps", [3, 7])  # in the first epoch of seven, and at its end
def test_killed_at_every_moment_after_the_last_step(make_config, killed, monkeypatch, steps):
    training = {"max_steps": steps, "save_steps": 1, "eval_steps": 3}
    *cut, whole = killed(make_config(training=training), f"checkpoint-{steps}")
    assert len(cut) > 15
    for folder in cut if steps == 3 else cut[:1]:
        report = go_on(make_config, folder, training, monkeypatch)
        assert report.step_ms is None
        assert_same_run(whole, folder)


def test_early_stopping_does_not_begin_again(make_config, killed, monkeypatch):
    training = {"max_steps": 6, "save_steps": 1, "eval_steps": 1, "learning_rate": 1e-30}
    options = {"early_stopping_patience": 2}
    cut = killed(make_config(training=training, **options), "checkpoint-3")
    assert not (cut[-1] / "checkpoint-4").exists()
    assert go_on(make_config, cut[0], training, monkeypatch, **options).num_steps == 3
