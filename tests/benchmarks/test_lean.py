"""The benchmark of lean activations: a small run is complete, and counts what is kept."""

import json

import pytest

from benchmarks import lean as benchmark
from benchmarks.lean import check, count, formula_units, parse
from benchmarks.lean_variants import VARIANTS
from benchmarks.llama import Shape
from pacatune import lean

SHAPE = Shape(
    hidden_size=64,
    intermediate_size=224,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(benchmark, "LAYER", SHAPE)
    monkeypatch.setattr(benchmark, "SMALL", SHAPE)
    monkeypatch.setattr(benchmark, "_NUM_COUNTED", 24)


@pytest.mark.usefixtures("small")
def test_complete_result(tmp_path, capsys):
    options = ["--seconds", "0", "--min-rounds", "2", "--warmup", "1", "--threads", "1"]
    options += ["--tokens", "6", "--dtypes", "float32", "--methods", "paca", "lora"]
    benchmark.main(["--output", str(tmp_path), *options])
    result = json.loads((tmp_path / "lean.json").read_text())
    assert [row["method"] for row in result["counts"]] == ["paca"] * 8 + ["lora"] * 18
    for row in result["counts"]:
        assert row["units"] == pytest.approx(sum(row["units_by_module"].values()))
    paca = {(r["variant"], r["is_padded"]): r["units"] for r in result["counts"][:8]}
    for level in (1, 2, 3):
        assert paca[f"level {level}", False] == pytest.approx(formula_units(SHAPE, level))
    # One mask for all layers: a second layer keeps none.
    assert paca["level 1", True] == pytest.approx(paca["level 1", False])
    assert paca["plain", False] > 1.4 * paca["level 1", False]
    assert paca["plain", True] > paca["plain", False]
    lora = {r["variant"]: r["units"] for r in result["counts"][8:15]}
    # What both keep of rank 8 is the only difference.
    assert lora["inputs"] == pytest.approx(paca["level 1", False], abs=7 * 8 * 2 / 64)
    assert lora["checkpointed"] == paca["checkpointed", False] == pytest.approx(2)
    assert {row["method"] for row in result["rows"]} == {"paca", "lora"}
    assert {row["variant"] for row in result["rows"]} == set(VARIANTS)
    assert all(row["step_ms"] > 0 for row in result["rows"])
    targets = {ratio["variant"]: ratio["target"] for ratio in result["ratios"]}
    assert (targets["level 1"], targets["level 2"], targets["inputs"]) == (1.02, 1.2, None)
    assert "| paca" in capsys.readouterr().out


def test_units_of_the_real_layer():
    """2 x 14 for gate and up, 4 for two norms, 5 for attention, and little else."""
    assert formula_units(benchmark.LAYER) == pytest.approx(23.05664)
    for name, level in benchmark.LEVELS.items():
        assert formula_units(benchmark.LAYER, level) < benchmark.MAX_UNITS[name]


def test_something_else_that_is_kept_is_an_error(monkeypatch):
    monkeypatch.setattr(benchmark, "_NUM_COUNTED", 24)
    row = count("paca", "float32", "level 1", False, SHAPE, 0)
    check([row], SHAPE)
    monkeypatch.setattr(lean, "enable", lambda model, mode, level: None)
    row = count("paca", "float32", "level 1", False, SHAPE, 0)
    with pytest.raises(RuntimeError, match="so something else is saved"):
        check([row], SHAPE)


def test_bad_options(capsys):
    with pytest.raises(SystemExit):
        parse(["--scale", "3"])
    assert "--scale (3) must divide the 8 KV heads" in capsys.readouterr().err
