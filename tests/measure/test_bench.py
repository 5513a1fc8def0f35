"""A run as a whole: where sweeps end on a CPU, and what is written when."""

import json

import pytest

from pacatune.measure import bench
from pacatune.measure.bench import find_limit, result_folder, sweep_method
from pacatune.measure.setting import MicroBatch
from pacatune.measure.step import Outcome, count, time_together


def test_a_sweep_on_a_cpu_ends_before_the_machine_swaps(make_config, monkeypatch, tmp_path):
    limits = []

    def sweep(config, method, tell):
        limits.append(config.memory_limit)
        written = json.loads((tmp_path / "bench.json").read_text()) if len(limits) == 2 else {}
        assert not written.get("finished")
        return {"method": method, "limit": 1}, [{"method": method}]

    monkeypatch.setattr(bench, "sweep_method", sweep)
    monkeypatch.setattr(bench, "available_bytes", lambda device: 1000)
    folder = result_folder(tmp_path)
    folder.start_anew()
    result = bench.run(make_config(sweep="batch"), folder, "pacatune bench", print)
    assert limits == [800, 800]
    assert result["config"]["memory_limit"] == 800
    assert [point["method"] for point in result["points"]] == ["paca", "lora"]
    assert json.loads((tmp_path / "bench.json").read_text())["finished"]
    bench.run(make_config(sweep="batch", memory_limit=70), folder, "pacatune bench", print)
    assert limits[2:] == [70, 70]


def test_a_sweep_without_an_end_is_refused(make_config, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "available_bytes", lambda device: None)
    with pytest.raises(ValueError, match="a sweep on a CPU needs to know how much memory is free"):
        bench.run(make_config(sweep="batch"), result_folder(tmp_path), "pacatune bench", print)


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 64, 100])
def test_the_limit_is_found_exactly_where_asked_for(limit):
    tried = []

    def fits(number):
        tried.append(number)
        return number <= limit

    assert find_limit(fits, start=1, highest=None, precision=None) == (limit, True)
    assert len(tried) == len(set(tried))


def test_long_limits_are_found_to_a_share():
    for limit in (90, 128, 10_000):
        found, is_reached = find_limit(
            lambda n, most=limit: n <= most, start=128, highest=None, precision=64
        )
        assert is_reached
        assert limit * (1 - 1 / 32) <= found <= limit


def test_a_sweep_ends_at_the_largest_number_allowed():
    tried = []
    assert find_limit(lambda n: not tried.append(n), start=1, highest=6, precision=None) == (
        6,
        False,
    )
    assert tried == [1, 2, 4, 6]
    assert find_limit(lambda n: True, start=128, highest=7, precision=64) == (7, False)


def test_the_longest_sequence_is_found_in_a_limited_memory(make_config, monkeypatch):
    monkeypatch.setattr(bench, "_PRECISION", 4)  # fewer processes
    lines = []
    config = make_config(sweep="seq-len", memory_limit=40 * 2**20, sweep_max=2**16)
    found, points = sweep_method(config, "full", lines.append)
    assert found["is_memory_the_limit"]
    assert 128 <= found["limit"] < found["next_failed"] < 2**16
    assert "allocate" in found["reason"] or "was ended by" in found["reason"]
    assert len(lines) == len(points)
    for point in points:
        is_in = point["num_tokens"] <= found["limit"]
        assert point["status"] == ("measured" if is_in else "out of memory")
        assert ("peak_bytes" in point) == is_in
    assert [point["num_tokens"] for point in points] == sorted(p["num_tokens"] for p in points)


def test_a_batch_that_does_not_fit_ends_the_sweep(make_config, monkeypatch):
    def run(measure, config, setting, method):
        rate = {"step_ms": 1.0, "sentences_per_second": 1000.0 * setting.num_rows}
        return Outcome(rate) if setting.num_rows <= 3 else Outcome(None, "no more")

    monkeypatch.setattr(bench, "run_in_child", run)
    found, points = sweep_method(make_config(sweep="batch", seq_len=8, tokens=(8,)), "paca", print)
    assert (found["limit"], found["next_failed"], found["reason"]) == (3, 4, "no more")
    assert [(p["num_rows"], p["num_tokens"], p["status"]) for p in points] == [
        (1, 8, "measured"),
        (2, 8, "measured"),
        (3, 8, "measured"),
        (4, 8, "out of memory"),
    ]


@pytest.fixture
def in_this_process(monkeypatch):
    """Run measurements here, where memory ends by the test's rule."""

    def patch(too_much):
        def run(measure, config, setting, what):
            if too_much(measure, what):
                return Outcome(None, "no more")
            return Outcome(measure(config, setting, what))

        monkeypatch.setattr(bench, "run_in_child", run)

    return patch


SETTING = MicroBatch(num_rows=1, num_tokens=6)


def test_what_does_not_fit_is_said_and_the_others_are_measured(make_config, in_this_process):
    in_this_process(lambda measure, what: measure is count and what == "full")
    config = make_config(methods=("frozen", "paca", "full"))
    rows, ratios = bench.compare_methods(config, SETTING, lambda line: None)
    by_method = {row["method"]: row for row in rows}
    assert by_method["full"]["status"] == "out of memory"
    assert by_method["full"]["reason"] == "no more"
    assert "step_ms" not in by_method["full"]
    assert [(ratio["method"], ratio["reference"]) for ratio in ratios] == [("paca", "frozen")]
    # Timed with `frozen`, and alone where `full` would have been its partner.
    assert by_method["paca"]["num_rounds"] == 2 * config.min_rounds


def test_two_that_do_not_fit_together_are_timed_apart(make_config, in_this_process):
    in_this_process(lambda measure, what: measure is time_together and len(what) == 2)
    rows, ratios = bench.compare_methods(make_config(), SETTING, lambda line: None)
    assert ratios == []
    for row, other in zip(rows, ("lora", "paca"), strict=True):
        assert row["timed_apart_from"] == [other]
        assert row["step_ms"] > 0


def test_a_method_that_fits_only_uncounted_is_out_of_memory(make_config, in_this_process):
    in_this_process(lambda measure, what: measure is time_together)
    rows, _ = bench.compare_methods(make_config(), SETTING, lambda line: None)
    assert {row["status"] for row in rows} == {"out of memory"}
