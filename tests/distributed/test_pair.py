"""The processes of these tests: a crash in native code ends no test that a second try passes."""

import os
import signal

import pytest

from tests import forks


def crash_below(folder, number):
    """Crash as a fault in native code would, in so many calls."""
    if int(os.environ["RANK"]) == 1 and len(found := [*folder.iterdir()]) < number:
        (folder / str(len(found))).touch()
        signal.raise_signal(signal.SIGSEGV)
    return os.environ["RANK"]


def test_what_crashes_once_is_run_again(pair, tmp_path):
    assert pair.run(crash_below, tmp_path, 1) == ["0", "1"]
    assert forks.repeated == ["crash_below"]
    forks.repeated.clear()  # it is told of tests that crash by accident


def test_what_crashes_again_fails(pair, tmp_path):
    with pytest.raises(RuntimeError, match="rank 1: the process has ended"):
        pair.run(crash_below, tmp_path, 2)
    forks.repeated.clear()
