"""The gate of the benchmarks: exact numbers are those that are committed, and a change is said."""

import copy
import json

import pytest

from benchmarks import check
from benchmarks.record import RESULTS

ONE_STEP = ("--tokens", "16", "--methods", "frozen", "paca", "dora", "--dtypes", "float32")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize("name", ["step", "layer"])
def test_bytes_and_writes_are_those_that_are_committed(name):
    result = check.committed(name)
    if other := check.other_versions(result):
        pytest.skip(other)
    found = check.exact_rows(name, *ONE_STEP)
    assert len(found["rows"]) >= 3
    assert list(check.differences(found, result)) == []


def test_each_exact_number_is_compared():
    """Of committed rows, all but times and noise; every change of one is a line."""
    result = check.committed("step")
    row = next(row for row in result["rows"] if row["method"] == "paca")
    exact = check._exact(row)
    assert exact.keys() >= {"saved_bytes", "saved_bytes_by_layer", "column_writes_per_layer"}
    assert not any(name.endswith(("_ms", "_us", "of_others", "rounds")) for name in exact)
    assert list(check.differences({"rows": result["rows"]}, result)) == []
    worse = copy.deepcopy(row)
    worse["saved_bytes"] += 1
    worse["saved_bytes_by_layer"]["q_proj"] += 1
    worse["step_ms"] *= 2
    lines = list(check.differences({"rows": [worse]}, result))
    assert [line.rpartition(": ")[2].partition(" is ")[0] for line in lines][:1] == ["saved_bytes"]
    assert len(lines) == 2
    assert f"saved_bytes is {row['saved_bytes'] + 1}, committed {row['saved_bytes']}" in lines[0]


def test_rows_and_numbers_that_nobody_committed_are_said():
    result = check.committed("step")
    row = {**result["rows"][0], "method": "new"}
    (line,) = check.differences({"rows": [row]}, result)
    assert line == "rows, setting 16 tokens, float32, method new: not in the committed result"
    (line,) = check.differences({"rows": [{**result["rows"][0], "num_new": 1}]}, result)
    assert line.endswith("num_new is not in the committed result")


def test_times_may_be_fifteen_per_cent_slower():
    result = check.committed("layer")
    assert list(check.slower(result["ratios"], result)) == []
    first = result["ratios"][0]
    rows = [{**first, "ratio": factor * first["ratio"]} for factor in (0.5, 1.149, 1.151)]
    (line,) = check.slower(rows, result)
    assert f"the ratio of times is {rows[2]['ratio']:.3f}, committed {first['ratio']:.3f}" in line
    (line,) = check.slower([{**first, "setting": "another"}], result)
    assert line.endswith("the ratio of times is not in the committed result")


def test_every_committed_row_has_a_name_of_its_own():
    for name in {*check.EXACT, *check.SLOW}:
        result = json.loads((RESULTS / f"{name}.json").read_text())
        sections = {"kernels": ("rows", "compiled", "sharded"), "estimate": ("table_1", "table_3")}
        for section in sections.get(name, ("rows",)):
            keys = [check._key(row) for row in result[section]]
            assert len(set(keys)) == len(keys), (name, section)


def test_the_exit_status(monkeypatch, capsys):
    rows = check.committed("layer")["rows"]
    monkeypatch.setattr(check, "EXACT", {"layer": lambda: {"rows": rows}})
    monkeypatch.setattr(check, "SLOW", {})
    assert check.main(["layer"]) == 0
    assert capsys.readouterr().out == f"layer: {len(rows)} rows as committed\n"
    worse = [{**rows[0], "saved_bytes": -1}]
    monkeypatch.setattr(check, "EXACT", {"layer": lambda: {"rows": worse}})
    assert check.main([]) == 1
    assert "1 numbers differ. Meant? Run the benchmarks" in capsys.readouterr().out
    monkeypatch.setattr(check, "package_version", lambda name: "0.1")
    assert check.main([]) == 0
    assert "layer: not compared, since it is of torch 2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        check.main(["nosuch"])


def test_times_are_run_with_the_options_of_the_committed_result(monkeypatch, capsys):
    given = []

    def measured(name, options):
        given.append((name, *options))
        ratios = check.committed(name)["ratios"]
        return {"rows": [], "ratios": [{**ratios[0], "ratio": 2 * ratios[0]["ratio"]}]}

    monkeypatch.setattr(check, "EXACT", {"switch": lambda: {"rows": []}})
    monkeypatch.setattr(check, "measured", measured)
    monkeypatch.setattr(check, "cpu_name", lambda: check.committed("switch")["cpu"]["name"])
    assert check.main(["switch", "--times"]) == 1
    assert given == [("switch", "--seconds", "6", "--dtypes", "float32")]
    said = capsys.readouterr().out
    assert "switch: 0 of 1 ratios of times as committed" in said
    assert "the ratio of times is" in said

    # On another processor it is said, and does not count.
    monkeypatch.setattr(check, "cpu_name", lambda: "another")
    assert check.main(["switch", "--times"]) == 0
    said = capsys.readouterr().out
    assert ", here another; these do not count:\nswitch: setting" in said
    assert "the ratio of times is" in said
