import errno
import shutil
import stat

import pytest
from safetensors import SafetensorError

from pacatune.files.folder import (
    check_output,
    explained_failure,
    is_write_failure,
    staged_folder,
)
from tests.full_disk import limited_files


def fill(folder, action):
    """Let a function write into the staging folder of an output folder."""
    with staged_folder(folder, 10) as staging:
        action(staging)


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_appears_when_it_is_complete(tmp_path, is_there):
    target = tmp_path / "new" / "out"
    if is_there:
        target.mkdir(parents=True)
    with staged_folder(target, 10) as staging:
        (staging / "file").write_text("text")
        (staging / "file").chmod(0o600)  # as safetensors leaves it
        assert not (target / "file").exists()
        assert staging.parent.parent == target.parent
    assert (target / "file").read_text() == "text"
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    mode = stat.S_IMODE(target.parent.stat().st_mode)
    assert stat.S_IMODE(target.stat().st_mode) == mode
    assert stat.S_IMODE((target / "file").stat().st_mode) == mode & 0o666


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, FileNotFoundError])
def test_nothing_is_left_after_an_error(tmp_path, error):
    def fail(staging):
        (staging / "file").touch()
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        fill(tmp_path / "out", fail)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused_and_kept(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match=r"output folder '.*' is not empty; choose another"):
        fill(tmp_path, lambda staging: (staging / "mine").touch())
    with pytest.raises(FileExistsError, match=r"output '.*mine' is not a folder"):
        check_output(tmp_path / "mine", 10)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match=r"output '.*link' is not a folder"):
        check_output(tmp_path / "link", 10)
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_folder_filled_in_the_meantime_is_kept(tmp_path):
    target = tmp_path / "out"

    def interfere(staging):
        target.mkdir()
        (target / "theirs").touch()

    with pytest.raises(FileExistsError, match="is not empty"):
        fill(target, interfere)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "theirs").exists()


def test_a_disk_without_room_is_refused_before_writing(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(ValueError, match=r"the disk of '.*' has .* free but .* are needed"):
        check_output(tmp_path / "a" / "b", 2 * free)


def test_a_disk_that_runs_full_leaves_nothing(tmp_path):
    full = pytest.raises(ValueError, match=r"could not write '.*out' .*nothing was left behind")
    with limited_files(), full:
        fill(tmp_path / "out", lambda staging: (staging / "file").write_text("x" * 2000))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        SafetensorError("Error: I/O error: No space left (os error 28)"),
        Exception("No space left on device (os error 28)"),  # tokenizers
    ],
)
def test_write_failures_of_all_libraries(tmp_path, error):
    with (
        pytest.raises(ValueError, match=r"could not write .*; make room"),
        explained_failure(tmp_path, "make room"),
    ):
        raise error
    assert not is_write_failure(RuntimeError("shapes differ"))
    assert not is_write_failure(SafetensorError("invalid header"))
