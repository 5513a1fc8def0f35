"""The gate of the benchmarks: exact numbers are those that are committed, and a change is said."""

from dataclasses import replace

import pytest

from benchmarks import check

ONE_STEP = ("--tokens", "16", "--methods", "frozen", "paca", "dora", "--dtypes", "float32")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def exact(rows):
    return [row for row in rows if row.origin in check._EXACT]


def test_bytes_and_writes_are_those_that_are_committed():
    rows, made = check.committed("step")
    if other := check.other_versions(made):
        pytest.skip(other)
    found = exact(check.measured("step", [*check._QUICK, *ONE_STEP]))
    assert len({row.method for row in found}) == 3
    assert list(check.differences(found, rows)) == []


def test_each_exact_number_is_compared():
    rows, _ = check.committed("step")
    found = exact(rows)
    assert {row.what for row in found} == {
        *("trained parameters", "kept for backward", "column writes per layer"),
    }
    assert list(check.differences(found, rows)) == []
    worse = replace(found[0], value=found[0].value + 1)
    (line,) = check.differences([worse], rows)
    assert line.endswith(f"{worse.value}, committed {found[0].value}")
    (line,) = check.differences([replace(found[0], method="new")], rows)
    assert line.endswith("not in the committed result")


def test_times_may_be_fifteen_per_cent_slower():
    rows, _ = check.committed("switch")
    ratios = [row for row in rows if row.unit == "ratio"]
    assert list(check.slower(ratios, rows)) == []
    first = ratios[0]
    changed = [
        replace(first, value=factor * first.value, low=None, high=None)
        for factor in (0.5, 1.149, 1.151)
    ]
    (line,) = check.slower(changed, rows)
    assert f"is {changed[2].value:.3f}, committed {first.value:.3f}" in line
    (line,) = check.slower([replace(first, setting="another")], rows)
    assert line.endswith("the ratio of times is not in the committed result")


@pytest.mark.parametrize("name", sorted({*check.EXACT, *check.SLOW}))
def test_every_committed_row_has_a_name_of_its_own(name):
    rows, _ = check.committed(name)
    keys = [check._key(row) for row in exact(rows)]
    assert keys
    assert len(set(keys)) == len(keys)


def test_the_exit_status(monkeypatch, capsys):
    rows = exact(check.committed("switch")[0])
    monkeypatch.setattr(check, "other_versions", lambda made: "")
    monkeypatch.setattr(check, "EXACT", {"switch": lambda: rows})
    monkeypatch.setattr(check, "SLOW", {})
    assert check.main(["switch"]) == 0
    assert capsys.readouterr().out == f"switch: {len(rows)} rows as committed\n"
    monkeypatch.setattr(check, "EXACT", {"switch": lambda: [replace(rows[0], value=-1)]})
    assert check.main([]) == 1
    assert "1 numbers differ" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        check.main(["steps"])
    assert "steps: choose from" in capsys.readouterr().err


def test_other_versions_are_not_compared(capsys, monkeypatch):
    made = {"versions": {"torch": "1.0"}}
    monkeypatch.setattr(check, "committed", lambda name: ([], made))
    assert check.check(["step"], everything=False, times=False) == 0
    assert "step: not compared, since it is of torch 1.0, here" in capsys.readouterr().out
