"""Jobs: each is done once, and what failed again."""

import json

import pytest

from experiments.jobs import Job, done
from pacatune.files.owned_folder import OwnedFolder
from pacatune.reports.rows import Row


def row(**more):
    return Row(what="step", method="paca", value=2.0, **more)


@pytest.fixture
def folder(tmp_path):
    opened = OwnedFolder(path=tmp_path / "results", kind="a test")
    opened.begin()
    return opened


def test_done_runs_each_job_once(folder):
    calls = []

    def run(work):
        calls.append(work)
        return [row(low=1.0, high=3.0, n=5, unit="ms", note="of a test")]

    jobs = [Job(key=key, inputs={"of": [1, 2]}, run=run) for key in ("a", "b")]
    told = []
    here = {"commit": "0123", "is_modified": False}
    first = done(jobs, folder, tell=told.append, code=lambda: here)
    assert told == ["1/2: a ...", "2/2: b ..."]
    assert first["a"].provenance.items() >= here.items()
    assert done(jobs, folder) == first
    assert len(calls) == 2
    assert first["a"].rows == run(None)
    file = json.loads((folder.path / "jobs" / "a.json").read_text())
    assert file["rows"][0] == {
        **{"what": "step", "method": "paca", "value": 2.0, "unit": "ms"},
        **{"low": 1.0, "high": 3.0, "n": 5, "note": "of a test"},
    }
    assert {"date", "machine", "versions", "commit"} <= file["provenance"].keys()
    # Tuples are lists in the file, and no other inputs.
    same = Job(key="a", inputs={"of": (1, 2)}, run=run)
    assert done([same], folder)["a"] == first["a"]
    other = Job(key="a", inputs={"of": [1, 3]}, run=run)
    done([other], folder)
    assert len(calls) == 4  # with the one of this test's own
    assert calls[-1] != calls[0], "what other inputs left half done is not gone on with"
    assert not folder.foreign()


def test_failures_do_not_stop_the_others_and_are_tried_again(folder):
    """An interrupt ends all."""
    fails = [OSError("no\n  disk")]

    def run(work):
        for error in fails:
            raise error
        return [row()]

    jobs = [
        Job(key="bad", inputs={}, run=run),
        Job(key="good", inputs={}, run=lambda work: [row()]),
    ]
    found = done(jobs, folder)
    assert found["bad"].error == "OSError: no disk"
    assert found["good"].error is None
    assert "test_jobs.py" in json.loads((folder.path / "jobs/bad.json").read_text())["traceback"]
    fails[0] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        done(jobs, folder)
    fails.clear()
    assert done(jobs, folder)["bad"].rows == [row()]


@pytest.mark.parametrize("text", ["{", "[]", '{"inputs": {}, "rows": [{"value": 1}]}'])
def test_files_that_are_no_results(folder, text):
    job = Job(key="a", inputs={}, run=lambda work: [row()])
    done([job], folder)
    (folder.path / "jobs" / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is no result of a job .* delete it"):
        done([job], folder)
