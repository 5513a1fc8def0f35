import errno
import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from pacatune.training.output import (
    check_folder,
    clear_folder,
    is_write_failure,
    last_checkpoint,
    publish,
    refuse_empty_tensors,
    staged,
)


def make_run(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").touch()
    for name in names:
        if name.startswith("checkpoint") or name == "runs":
            (folder / name).mkdir()
            (folder / name / "trainer_state.json").write_text('{"global_step": 1}')
        else:
            (folder / name).touch()


def check(folder, resume=False, overwrite=False):
    check_folder(folder, resume=resume, overwrite=overwrite)


def test_new_empty_and_unrelated_folders_are_fine(tmp_path):
    check(tmp_path / "new")
    check(tmp_path)
    (tmp_path / "job.log").touch()
    check(tmp_path)


def test_run_that_came_to_nothing_is_fine(tmp_path):
    make_run(tmp_path, "runs")
    check(tmp_path)


@pytest.mark.parametrize(
    "name", ["checkpoint-3", "adapter_model.safetensors", "model-00001-of-00002.safetensors"]
)
def test_other_run_is_refused(tmp_path, name):
    make_run(tmp_path, name)
    with pytest.raises(
        FileExistsError,
        match=rf"holds another run \({name}\); choose another `training.output_dir`, continue "
        "with --resume, or delete it with --overwrite",
    ):
        check(tmp_path)
    check(tmp_path, overwrite=True)
    check(tmp_path, resume=True)


def test_finished_run_is_not_offered_to_be_resumed(tmp_path):
    make_run(tmp_path, "report.json")
    with pytest.raises(FileExistsError, match=r"`training.output_dir`, or delete it with --over"):
        check(tmp_path)
    with pytest.raises(ValueError, match="is finished; there is nothing to resume"):
        check(tmp_path, resume=True)


@pytest.mark.parametrize("name", ["README.md", "config.json", "runs", "adapter_config.json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_no_run_wrote_are_never_touched(tmp_path, name, overwrite):
    (tmp_path / name).touch()
    with pytest.raises(FileExistsError, match=f"holds {name}, which no run of pacatune wrote"):
        check(tmp_path, overwrite=overwrite)


def test_file_instead_of_folder(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(FileExistsError, match=r"out is a file; choose another `training.output"):
        check(tmp_path / "out")


def test_place_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(PermissionError, match=f"nothing can be written in {tmp_path}; choose"):
        check(tmp_path / "new" / "deep")


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="--resume and --overwrite exclude each other"):
        check(tmp_path, resume=True, overwrite=True)


def test_resume_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="holds no run to resume; start it without --resume"):
        check(tmp_path / "new", resume=True)


def test_clear_deletes_only_what_a_run_writes(tmp_path):
    ours = ["checkpoint-1", "runs", "adapter_config.json", "tokenizer.json", "loss.png"]
    make_run(tmp_path, *ours)
    foreign = ["notes.txt", "checkpoint-best", "my_report.json"]
    for name in foreign:
        (tmp_path / name).touch()
    assert clear_folder(tmp_path) == sorted([*ours, "config.yaml"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(foreign)


def test_clear_follows_no_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "runs").symlink_to(tmp_path / "elsewhere")
    clear_folder(tmp_path / "out")
    assert (tmp_path / "elsewhere" / "file").exists()
    assert not (tmp_path / "out" / "runs").is_symlink()


@pytest.mark.parametrize("state", [None, "", '{"global_step": 9', "[]", "{}"])
def test_last_checkpoint_is_the_last_complete_one(tmp_path, state):
    make_run(tmp_path, "checkpoint-2", "checkpoint-10", "checkpoint-9")
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    path = tmp_path / "checkpoint-10" / "trainer_state.json"
    path.unlink() if state is None else path.write_text(state)
    assert last_checkpoint(tmp_path).name == "checkpoint-9"


def test_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) is None


def test_staging_goes_away(tmp_path):
    with staged(tmp_path, "x") as staging:
        (staging / "file").touch()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), staged(tmp_path, "x"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_process_that_does_not_own_the_staging_leaves_it(tmp_path):
    with staged(tmp_path, "x", owner=False) as staging:
        (staging / "file").touch()
    assert (staging / "file").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        Exception("No space left on device (os error 28)"),  # tokenizers
    ],
)
def test_write_failure_says_what_is_intact(tmp_path, error):
    with (
        pytest.raises(OSError, match=r"could not save x .*No checkpoint was saved before; make"),
        staged(tmp_path, "x"),
    ):
        raise error
    make_run(tmp_path, "checkpoint-2")
    with (
        pytest.raises(OSError, match=r"could not save x .*checkpoint-2 is intact: make room"),
        staged(tmp_path, "x"),
    ):
        raise error
    assert last_checkpoint(tmp_path) is not None


def test_other_errors_are_not_disguised(tmp_path):
    assert not is_write_failure(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"), staged(tmp_path, "x"):
        raise RuntimeError("shapes differ")


def test_failed_safetensors_write(tmp_path):
    from safetensors import SafetensorError

    assert is_write_failure(SafetensorError("Error: I/O error: No space left (os error 28)"))
    assert not is_write_failure(SafetensorError("Error: invalid header"))


def test_publish_replaces_files_and_folders(tmp_path):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(name)
    publish(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["new.txt"]
    (tmp_path / "a").write_text("a")
    (tmp_path / "a").chmod(0o600)
    publish(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "a"
    assert (tmp_path / "b").stat().st_mode & 0o666 == tmp_path.stat().st_mode & 0o666


def test_all_is_on_disk_before_it_is_seen(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append((os.fstat(file).st_ino, (tmp_path / "b").exists()))
    )
    new = tmp_path / "a"
    new.mkdir()
    (new / "file").write_text("new")
    before = [(path.stat().st_ino, False) for path in (new, new / "file")]
    publish(new, tmp_path / "b")
    assert synced == [*before, (tmp_path.stat().st_ino, True)]


def test_empty_tensors_are_refused(tmp_path):
    save_file({"ok": np.ones((2, 2), np.float32)}, tmp_path / "adapter_model.safetensors")
    refuse_empty_tensors(tmp_path)
    save_file({"layer.paca_delta": np.ones((0, 2), np.float32)}, tmp_path / "b.safetensors")
    with pytest.raises(
        ValueError,
        match=r"'layer.paca_delta' has shape \(0, 2\) in b.safetensors: .*stage3_gather_16bit",
    ):
        refuse_empty_tensors(tmp_path)


def test_file_without_tensors_is_refused(tmp_path):
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=r"adapter_model.safetensors holds no tensor: .*stage3_gather"
    ):
        refuse_empty_tensors(tmp_path)


def test_state_is_read_as_json_only(tmp_path):
    make_run(tmp_path, "checkpoint-1")
    state = json.loads((tmp_path / "checkpoint-1/trainer_state.json").read_text())
    assert state == {"global_step": 1}
