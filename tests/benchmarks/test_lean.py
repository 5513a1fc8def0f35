"""The count of lean activations: a small run is complete, and something else that is kept shows."""

import pytest

from benchmarks import lean as benchmark
from benchmarks.lean import WHAT, count, formula_units
from benchmarks.models import llama_values
from benchmarks.results import read
from pacatune import lean

SHAPE = llama_values(64, 2, num_heads=4, num_kv_heads=2, intermediate_size=224, vocab_size=64)


def test_complete_result(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "LAYER", SHAPE)
    monkeypatch.setattr(benchmark, "_NUM_COUNTED", 24)
    benchmark.main(["--output", str(tmp_path)])
    rows = read("lean-part", tmp_path).rows
    kept = {(row.method, row.setting): row.value for row in rows if row.what == WHAT}
    assert len(kept) == len(rows) == 3 * 6 + 4 + 2
    for level in (1, 2, 3):
        assert kept["paca", f"level {level}"] == pytest.approx(formula_units(SHAPE, level))
    assert kept["paca", "plain"] > 1.4 * kept["paca", "level 1"]
    assert kept["lora", "checkpointed"] == kept["paca", "checkpointed"] == pytest.approx(2)
    monkeypatch.setattr(lean, "enable", lambda model, mode, level: None)
    with pytest.raises(RuntimeError, match="so something else is saved"):
        count("paca", "level 1", SHAPE)
