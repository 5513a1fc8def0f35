import json
import shutil

import numpy as np
import pytest
from accelerate.utils import DeepSpeedPlugin
from safetensors.numpy import save_file

from pacatune.training.output import (
    TrainedOn,
    check_folder,
    find_checkpoint,
    is_split_fixed,
    last_checkpoint,
    refuse_missing_weights,
    run_folder,
    what_is_intact,
)
from tests.adapters.fixtures import adapter_dir

__all__ = ["adapter_dir"]


def make_run(folder, *names):
    run = run_folder(folder)
    run.begin()
    for name in ("config.yaml", *names):
        is_folder = name.startswith("checkpoint")
        run.write(f"{name}/trainer_state.json" if is_folder else name, '{"global_step": 1}')


@pytest.fixture
def check(make_config):
    def run(folder, resume=False, overwrite=False, **options):
        config = make_config(training={"output_dir": str(folder)}, **options)
        check_folder(config, resume=resume, overwrite=overwrite)

    return run


def test_folders_that_are_fine(check, tmp_path):
    check(tmp_path / "new")
    (tmp_path / "empty/inner").mkdir(parents=True)
    # Columns in the configuration are no path.
    check(tmp_path / "empty", paca={"r": 2, "selection": {"layers.0.q_proj": [0, 1]}})
    make_run(tmp_path / "out", "runs/log")
    check(tmp_path / "out")
    make_run(tmp_path / "out", "checkpoint-3")
    check(tmp_path / "out", overwrite=True)
    # Resuming minds only what a run writes.
    (tmp_path / "out" / "config.yaml").write_text("# why I chose this\n")
    (tmp_path / "out" / "job.log").touch()
    check(tmp_path / "out", resume=True)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoint-3", "adapter_model.safetensors"):
        make_run(tmp_path / name.partition(".")[0], name)
    make_run(tmp_path / "finished", "report.json")
    make_run(tmp_path / "edited", "checkpoint-2")
    (tmp_path / "edited/checkpoint-2/mine").touch()
    (tmp_path / "edited/README.md").touch()
    (tmp_path / "file").touch()
    (tmp_path / "strange/config.yaml").mkdir(parents=True)
    (tmp_path / "strange/checkpoint-2").mkdir()


ANOTHER = r"holds another run \({}\); choose another `.*`, continue with --resume, or delete it"


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("checkpoint-3", {}, ANOTHER.format("checkpoint-3")),
        ("adapter_model", {}, ANOTHER.format("adapter_model.safetensors")),
        ("finished", {}, "choose another `training.output_dir`, or delete it with --overwrite"),
        ("finished", {"resume": True}, "is finished; there is nothing to resume"),
        ("edited", {"resume": True}, r"\(README.md, checkpoint-2/mine\)"),
        ("file", {}, r"file is a file; choose another: `training.output_dir`"),
        ("new", {"resume": True, "overwrite": True}, "--resume and --overwrite exclude each other"),
        ("strange", {"resume": True}, "holds no run to resume; start it without --resume"),
    ],
)
def test_folders_that_are_refused(check, folders, folder, options, message):
    with pytest.raises((ValueError, FileExistsError), match=message):
        check(folder, **options)


def test_place_that_cannot_be_written(check, tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    message = rf"nothing can be written in {tmp_path} \(Permission denied\); choose another `tr"
    with pytest.raises(PermissionError, match=message):
        check(tmp_path / "new" / "deep")


def test_what_a_run_reads_is_not_in_its_output_folder(check, adapter_dir, tmp_path):
    """Not even where the files are those of an earlier run."""
    folder = tmp_path / "out"
    make_run(folder, "report.json", "model/config.json", "columns.safetensors")
    shutil.copytree(adapter_dir, folder / "adapter")
    for where, options in {
        "model": {"model": {"path": str(folder / "model")}},
        "data": {"data": {"path": str(folder / "report.json")}},
        "adapter": {"adapter": str(folder / "adapter")},
        "selection": {"paca": {"selection": str(folder / "columns.safetensors")}},
    }.items():
        message = rf"{where}.* lies in the output folder .*out, which this run writes; choose"
        with pytest.raises(ValueError, match=message):
            check(folder, overwrite=True, **options)
        check(folder / "below", **options)


def test_last_checkpoint_is_the_last_complete_one(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) is None
    assert what_is_intact(tmp_path).startswith("no checkpoint was saved before; make room")
    make_run(tmp_path, "checkpoint-2", "checkpoint-10", "checkpoint-9")
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    path = tmp_path / "checkpoint-10" / "trainer_state.json"
    for state in ("", '{"global_step": 9', "[]", "{}", None):
        path.unlink() if state is None else path.write_text(state)
        assert last_checkpoint(tmp_path).name == "checkpoint-9"
    assert "checkpoint-9 is intact: make room" in what_is_intact(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "lacking"),
    [({"layer.paca_delta": np.ones((0, 2), np.float32)}, "layer.paca_delta"), ({}, "every weight")],
)
def test_missing_weights_are_refused(tmp_path, tensors, lacking):
    save_file({"ok": np.ones((2, 2), np.float32)}, tmp_path / "adapter_model.safetensors")
    refuse_missing_weights(tmp_path)
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=rf"b.safetensors lacks {lacking}: .*stage3_gather_16bit"):
        refuse_missing_weights(tmp_path)


def test_what_fixes_the_split(make_config):
    """A run goes on with another split of its steps only where they see the same examples."""
    assert not is_split_fixed(make_config().training.resolved())
    for option, value in {
        "train_sampling_strategy": "group_by_length",
        "dataloader_drop_last": True,
        "average_tokens_across_devices": False,
        "accelerator_config": {"split_batches": True},
    }.items():
        assert is_split_fixed(make_config(training={option: value}).training.resolved())
    training = make_config().training.resolved()
    training.deepspeed_plugin = DeepSpeedPlugin(zero_stage=2)
    assert is_split_fixed(training)


def trained_on(*split):
    return TrainedOn(fingerprint="data", split=[*split])


def test_a_checkpoint_goes_on_by_steps_of_as_many_examples(tmp_path):
    """Two processes have written it, of four examples each, twice accumulated."""
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    states = {"TrainedOn": trained_on(2, 4, 2).to_state()}
    state = {"global_step": 4, "stateful_callbacks": states}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    for split in ((2, 4, 2), (1, 4, 4), (4, 4, 1)):
        assert find_checkpoint(trained_on(*split), tmp_path) == checkpoint
    before = "by 2 processes x 4 examples x 2 accumulated, and cannot be continued by 1 process x"
    with pytest.raises(ValueError, match=f"{before} 4 .* needs numbers with the same product. Set"):
        find_checkpoint(trained_on(1, 4, 2), tmp_path)
    find_checkpoint(trained_on(2, 4, 2), tmp_path, is_fixed=True)
    with pytest.raises(ValueError, match=f"{before} 8 .* needs the same numbers. Set"):
        find_checkpoint(trained_on(1, 8, 2), tmp_path, is_fixed=True)
