"""Folders of results: only ever one's own, and of one process at a time."""

import multiprocessing

import pytest

from pacatune.folder_lock import alone_in
from pacatune.result_folder import ResultFolder


def folder_at(path):
    return ResultFolder(path=path, mark="probe.json", kind="a probe", others=("report.md",))


def hold(path, held, enough):
    with folder_at(path).opened():
        held.set()
        enough.wait(60)


@pytest.fixture
def busy(tmp_path):
    """A folder that another process is in."""
    context = multiprocessing.get_context("spawn")
    held, enough = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "out", held, enough))
    process.start()
    assert held.wait(60)
    yield tmp_path / "out", process
    enough.set()
    process.join()


def test_another_process_is_kept_out_until_its_end(busy):
    path, process = busy
    (path / "report.md").touch()
    with (
        pytest.raises(ValueError, match=r"another run is at work in .*out; .*--output DIR"),
        folder_at(path).opened(),
    ):
        pass
    assert (path / "report.md").exists()
    process.kill()
    process.join()
    with folder_at(path).opened():
        assert not (path / "report.md").exists()


def test_killed_between_lock_and_mark(tmp_path):
    with alone_in(tmp_path):
        pass
    (tmp_path / ".lock").touch()
    with folder_at(tmp_path).opened():
        assert (tmp_path / "probe.json").is_file()


def test_what_is_not_its_own_stays(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError, match=r"holds files but no probe\.json"):
        folder_at(tmp_path).open()
    with pytest.raises(FileExistsError, match="a file"), folder_at(tmp_path / "mine").opened():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
