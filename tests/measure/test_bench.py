"""A run as a whole: its jobs, where sweeps end, what memory ends, and what is written."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pacatune.measure import bench
from pacatune.measure.bench import find_limit, make_jobs, result_folder, sweep_method
from pacatune.measure.setting import MicroBatch
from pacatune.measure.step import count, time_together
from pacatune.reports.rows import Row

SETTING = MicroBatch(num_rows=1, num_tokens=6)


def test_a_sweep_on_a_cpu_ends_before_the_machine_swaps(make_config, monkeypatch):
    limits = []

    def run(measure, config, setting, method):
        memory.available -= 500  # what a method leaves
        limits.append(config.memory_limit)
        return []

    monkeypatch.setattr(bench, "run_in_child", run)
    memory = SimpleNamespace(available=1000)
    monkeypatch.setattr(bench.psutil, "virtual_memory", lambda: memory)
    for given in (None, 70):
        for job in make_jobs(make_config(sweep="batch", sweep_max=1, memory_limit=given)):
            job.run(Path())
    assert limits == [800, 800, 70, 70]


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 64, 100])
def test_the_limit_is_found_exactly_or_to_a_share_or_is_the_largest_allowed(limit):
    tried = []

    def fits(number):
        tried.append(number)
        return number <= limit

    assert find_limit(fits, start=1, highest=None, precision=None) == (limit, True)
    assert len(tried) == len(set(tried))
    most = 90 + 100 * limit
    found, is_reached = find_limit(lambda n: n <= most, start=128, highest=None, precision=64)
    assert is_reached
    assert most * (1 - 1 / 32) <= found <= most
    tried.clear()
    highest = find_limit(lambda n: not tried.append(n), start=1, highest=6, precision=None)
    assert (highest, tried) == ((6, False), [1, 2, 4, 6])
    assert find_limit(lambda n: True, start=128, highest=7, precision=64) == (7, False)


@pytest.fixture
def run_here(monkeypatch):
    """Run measurements in this process, where memory ends by the test's rule."""

    def patch(too_much):
        def run(measure, config, setting, what):
            if too_much(measure, setting, what):
                raise MemoryError("no more")
            return measure(config, setting, what)

        monkeypatch.setattr(bench, "run_in_child", run)

    return patch


def test_a_batch_that_does_not_fit_ends_the_sweep(make_config, run_here, monkeypatch):
    run_here(lambda measure, setting, what: setting.num_rows > 3)
    row = Row(what="step", method="paca", value=1.0)
    monkeypatch.setattr(bench, "run_point", lambda _, size, __: [replace(row, setting=size.label)])
    config = make_config(sweep="batch", seq_len=8, tokens=(8,), memory_limit=2**30)
    found, *points = sweep_method(config, "paca")
    assert (found.what, found.value, found.setting) == ("largest batch", 3, "rows of 8 tokens")
    assert found.note == "`paca`: memory of 1.0 GiB ended at 4 (no more)."
    assert [point.setting for point in points] == [f"{number} x 8 tokens" for number in (1, 2, 3)]


def written(config, folder, tell=print):
    output = result_folder(folder)
    with output.going_on("jobs", "bench.*"):
        result = bench.run(config, output, "pacatune bench", tell)
    return result, (folder / "bench.md").read_text()


@pytest.mark.usefixtures("blank_pictures")
def test_what_does_not_fit_is_said_and_the_others_are_measured(make_config, run_here, tmp_path):
    run_here(lambda measure, _, what: what == "full" if measure is count else "full" in what)
    result, page = written(make_config(methods=("frozen", "paca", "full")), tmp_path)
    rows = [row["method"] for row in result["rows"] if row["what"] == "step"]
    assert rows == ["paca", "frozen", "paca / frozen"]
    assert set(result["errors"].values()) == {"MemoryError: no more"}
    assert "Failed: 1 x 6 tokens: counting full: MemoryError: no more" in page
    # Two that do not fit together are timed apart.
    run_here(lambda measure, _, what: measure is time_together and len(what) == 2)
    rows = bench.time_pair(make_config(), SETTING, ("paca", "lora"), ["paca", "lora"])
    assert {row.method for row in rows} == {"paca", "lora"}
    assert rows[-1].note == "`lora` did not fit beside `paca` (no more): timed alone."


@pytest.mark.usefixtures("blank_pictures", "measured_here")
def test_a_second_run_goes_on(make_config, tmp_path):
    lines = []
    first, page = written(make_config(methods=("paca",)), tmp_path, lines.append)
    assert lines == ["1/2: 1 x 6 tokens: counting paca ...", "2/2: 1 x 6 tokens: timing paca ..."]
    again, same = written(make_config(methods=("paca",)), tmp_path, lines.append)
    assert (again, same, len(lines)) == (first, page, 2)
    more, _ = written(make_config(), tmp_path, lines.append)
    assert [line.partition(": ")[2] for line in lines[2:]] == [
        "1 x 6 tokens: counting lora ...",
        "1 x 6 tokens: timing paca and lora ...",
    ]
    assert first["rows"][0] in more["rows"]
    assert json.loads((tmp_path / "bench.json").read_text()) == json.loads(json.dumps(more))
