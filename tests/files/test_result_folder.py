"""Folders of results: only ever one's own, and of one process at a time."""

import subprocess
import sys

import pytest

from pacatune.files.result_folder import ResultFolder, alone_in

# Holds a folder until its input ends.
SCRIPT = """
import sys
from pathlib import Path
from pacatune.files.result_folder import alone_in

with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def folder_at(path):
    return ResultFolder(path=path, mark="probe.json", kind="a probe", others=("report.md",))


@pytest.fixture
def busy(tmp_path):
    """A folder that another process is in."""
    path = tmp_path / "out"
    folder_at(path).open()
    command = [sys.executable, "-c", SCRIPT, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield path, process


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
    process.wait()
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
