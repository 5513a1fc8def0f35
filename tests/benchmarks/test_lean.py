"""The benchmark of lean activations: a small run is complete, and counts what is kept."""

import pytest

from benchmarks import lean as benchmark
from benchmarks.lean import VARIANTS, WHAT, count, formula_units
from benchmarks.models import llama_values
from benchmarks.results import read
from pacatune import lean

SHAPE = llama_values(64, 2, num_heads=4, num_kv_heads=2, intermediate_size=224, vocab_size=64)


def test_complete_result(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "LAYER", SHAPE)
    monkeypatch.setattr(benchmark, "SMALL", SHAPE)
    monkeypatch.setattr(benchmark, "_NUM_COUNTED", 24)
    options = "--seconds 0 --min-rounds 2 --warmup 1 --threads 1 --tokens 6 --dtypes float32"
    methods = ["--methods", "paca", "lora", "lora_bf16"]
    benchmark.main(["--output", str(tmp_path), *options.split(), *methods])
    rows = read("lean-part", tmp_path).rows
    kept = {(row.method, row.setting): row.value for row in rows if row.what == WHAT}
    assert len(kept) == 3 * 6
    for level in (1, 2, 3):
        assert kept["paca", f"level {level}"] == pytest.approx(formula_units(SHAPE, level))
    assert kept["paca", "plain"] > 1.4 * kept["paca", "level 1"]
    assert kept["lora", "checkpointed"] == kept["paca", "checkpointed"] == pytest.approx(2)
    ratios = [row for row in rows if row.unit == "ratio"]
    others = [f"{name} / level 1" for name in VARIANTS if name not in ("plain", "level 1")]
    names = {"level 1 / plain", *others}
    assert {(row.method, row.what) for row in ratios} == {
        (method, name) for method in ("paca", "lora") for name in names
    }
    assert all(row.low <= row.value <= row.high for row in ratios)
    assert "level 2 / level 1" in capsys.readouterr().out


def test_something_else_that_is_kept_is_an_error(monkeypatch):
    monkeypatch.setattr(benchmark, "_NUM_COUNTED", 24)
    count("paca", "level 1", SHAPE, 0)
    monkeypatch.setattr(lean, "enable", lambda model, mode, level: None)
    with pytest.raises(RuntimeError, match="so something else is saved"):
        count("paca", "level 1", SHAPE, 0)
