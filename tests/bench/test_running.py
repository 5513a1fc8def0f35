"""A run as a whole: where sweeps end on a CPU, and what is written when."""

import json

import pytest

from pacatune import bench
from pacatune.bench import running
from pacatune.bench.output import result_folder


def test_the_package_offers_what_it_says():
    assert bench.__all__ == [
        "METHODS",
        "BenchConfig",
        "Setting",
        "llama_values",
        "load_values",
        "parse_shape",
        "run",
    ]


def test_a_sweep_on_a_cpu_ends_before_the_machine_swaps(make_config, monkeypatch, tmp_path):
    limits = []

    def sweep(config, method, tell):
        limits.append(config.memory_limit)
        written = json.loads((tmp_path / "bench.json").read_text()) if len(limits) == 2 else {}
        assert not written.get("finished")
        return {"method": method, "limit": 1}, [{"method": method}]

    monkeypatch.setattr(running, "sweep_method", sweep)
    monkeypatch.setattr(running, "available_bytes", lambda device: 1000)
    result = running.run(
        make_config(sweep="batch"), result_folder(tmp_path), "pacatune bench", print
    )
    assert limits == [800, 800]
    assert result["config"]["memory_limit"] == 800
    assert [point["method"] for point in result["points"]] == ["paca", "lora"]
    assert json.loads((tmp_path / "bench.json").read_text())["finished"]
    running.run(
        make_config(sweep="batch", memory_limit=70),
        result_folder(tmp_path),
        "pacatune bench",
        print,
    )
    assert limits[2:] == [70, 70]


def test_a_sweep_without_an_end_is_refused(make_config, monkeypatch, tmp_path):
    monkeypatch.setattr(running, "available_bytes", lambda device: None)
    with pytest.raises(ValueError, match="a sweep on a CPU needs to know how much memory is free"):
        running.run(make_config(sweep="batch"), result_folder(tmp_path), "pacatune bench", print)
