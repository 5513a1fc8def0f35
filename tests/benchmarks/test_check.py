"""The gate of the benchmarks: exact numbers are those that are committed, and a change is said."""

from dataclasses import replace

import pytest

from benchmarks import check
from benchmarks.results import read
from experiments.jobs import Finished
from experiments.reproduce.catalogue import EXPERIMENTS
from experiments.reproduce.experiment import read_results
from pacatune.reports.rows import Row

ONE_STEP = ("--tokens", "16", "--methods", "frozen", "paca", "dora", "--dtypes", "float32")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def exact(rows):
    return [row for row in rows if row.origin in check._EXACT]


def test_bytes_and_writes_are_those_that_are_committed():
    committed = read("step")
    if other := check.other_versions(committed.provenance):
        pytest.skip(other)
    found = exact(check.run_steps(*ONE_STEP))
    assert len({row.method for row in found}) == 3
    assert list(check.differences(found, committed.rows)) == []


def test_each_exact_number_is_compared():
    rows = read("step").rows
    found = exact(rows)
    exact_ones = {"trained parameters", "kept for backward", "column writes per layer"}
    assert {row.what for row in found} == exact_ones
    assert list(check.differences(found, rows)) == []
    worse = replace(found[0], value=found[0].value + 1)
    (line,) = check.differences([worse], rows)
    assert line.endswith(f"{worse.value}, committed {found[0].value}")
    (line,) = check.differences([replace(found[0], method="new")], rows)
    assert line.endswith("not in the committed result")


@pytest.mark.usefixtures("with_moslora")
def test_every_committed_row_has_a_name_of_its_own_and_every_estimate_of_the_paper_is_compared():
    """What is counted beside a measurement takes the measuring."""
    for name in check.NAMES:
        for _, committed in check.parts(name, everything=True):
            keys = [check._key(row) for row in exact(committed.rows)]
            assert len(set(keys)) == len(keys) > 0
    compared = [one.provenance for _, one in check.parts("estimate", everything=True)]
    for name in EXPERIMENTS:
        for key, job in read_results(name).items():
            is_exact = bool(exact(job.rows)) and key not in ("bench", "steps")
            assert (job.provenance in compared) == is_exact, (name, key)


def part(*values, method="paca", torch="2"):
    """What `check.parts` yields: numbers that are computed as they are committed."""
    names = {"what": "bytes", "method": method, "origin": "counted"}
    rows = [Row(value=value, setting=str(i), **names) for i, value in enumerate(values)]
    return lambda: rows, Finished(rows=rows, provenance={"versions": {"torch": torch}})


def test_the_exit_status_and_what_other_versions_have_computed(monkeypatch, capsys):
    """It is not compared; the rest is."""
    monkeypatch.setattr(check, "VERSIONS", ("torch",))
    monkeypatch.setattr(check, "package_version", lambda name: "2")
    monkeypatch.setattr(check, "NAMES", ("step",))
    found = [part(1, 2), part(3, method="lora", torch="1.0")]
    monkeypatch.setattr(check, "parts", lambda name, everything: found)
    assert check.main(["step"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "step: not compared where it is of torch 1.0, here 2",
        "step: 2 rows as committed",
    ]
    found[:] = [(part(1, 3)[0], found[0][1])]
    assert check.main([]) == 1
    out = capsys.readouterr().out
    assert "step: bytes, paca, 1: 3, committed 2" in out
    assert "1 numbers differ" in out
    with pytest.raises(SystemExit):
        check.main(["steps"])
    assert "steps: choose from" in capsys.readouterr().err
