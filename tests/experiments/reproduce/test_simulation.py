"""The memory columns: the paper's settings, and small models in their place."""

import json

import pytest

from pacatune.cli import main
from pacatune.experiments.reproduce import limits, simulation
from pacatune.experiments.reproduce.simulation import (
    setting_of,
    simulate_length,
    simulate_peak,
    tokens_for,
)
from pacatune.measure.estimate import estimate_memory
from pacatune.paper import TABLES
from tests.measure.real_step import LLAMA, tiny, write_config

_AVAILABLE = 2**30


def test_settings_are_the_papers():
    setting = setting_of("table1", TABLES["table1"].row("llama2-7b-lora-r8"))
    assert (setting.batch_size, setting.gradient_accumulation, setting.seq_len) == (2, 4, 512)
    assert (setting.dropout, setting.lean, setting.loss) == (0.1, "off", "logits")
    setting = setting_of("table1", TABLES["table1"].row("llama2-7b-paca-r16"))
    assert (setting.method, setting.rank, setting.dropout) == ("paca", 16, 0.0)
    setting = setting_of("table2", TABLES["table2"].row("llama3-8b-paca-r128"))
    assert (setting.rank, setting.batch_size, setting.seq_len) == (128, 4, 768)
    setting = setting_of("table3", TABLES["table3"].row("llama3.1-70b-qpaca-r64"))
    assert (setting.method, setting.quantization, setting.batch_size) == ("paca", "nf4", 8)
    setting = setting_of("table4", TABLES["table4"].row("llama3-8b-dora-r8"))
    assert (setting.rank, setting.batch_size, setting.gradient_accumulation) == (8, 1, 1)


def test_peak_and_the_tokens_that_explain_another(tmp_path):
    setting = tiny(tmp_path)
    estimate = estimate_memory(setting.but(batch_size=1, seq_len=700))
    result = simulate_peak(setting, estimate.peak_bytes / 1e9)
    assert result["peak_bytes"] == estimate_memory(setting).peak_bytes
    assert result["tokens_that_explain_it"] == pytest.approx(700, rel=0.01)
    assert result["tokens"] == setting.batch_size * setting.seq_len
    assert tokens_for(setting, estimate.peak_bytes) == result["tokens_that_explain_it"]


def test_no_length_fits(tmp_path):
    found = simulate_length(tiny(tmp_path), 1000)
    assert found == {"max_seq_len": 0, "peak_bytes": 0, "notes": []}


@pytest.fixture
def small_models(tmp_path, monkeypatch):
    """A Llama of one layer in the place of every model of the paper."""
    path = write_config(tmp_path, LLAMA, num_hidden_layers=1)

    def small(table, row):
        return setting_of(table, row).but(model=path)

    monkeypatch.setattr(simulation, "setting_of", small)
    monkeypatch.setattr(limits, "setting_of", small)
    monkeypatch.setattr(limits, "gpu_bytes", lambda name: _AVAILABLE)
    return path


def test_table_1_resumes_and_keeps_other_methods(small_models, tmp_path, capsys):
    words = ["reproduce", "table1", "--simulate", "--output", str(tmp_path / "out")]
    assert main([*words, "--only", "paca"]) == 0
    assert main([*words, "--only", "lora", "--resume"]) == 0
    assert "kept" not in capsys.readouterr().out
    assert main([*words, "--only", "paca", "--resume"]) == 0
    assert capsys.readouterr().out.count("kept") == 6
    result = json.loads((tmp_path / "out" / "table1.json").read_text())["table1"]
    rows = {row["row"]: row for row in result["rows"]}
    row = rows["llama3-8b-paca-r8"]
    setting = setting_of("table1", TABLES["table1"].row(row["row"])).but(model=small_models)
    number = row["ours"]["simulated_memory"]
    assert number["value"] == estimate_memory(setting).peak_bytes / 1e9
    assert number["origin"] == "simulated"
    assert row["paper"]["memory"] == 23
    assert rows["llama3-8b-lora-r8"]["ours"] != {}
    assert rows["llama3-8b-dora-r8"]["ours"] == {}
    assert len(result["missing"]) == 6
    page = (tmp_path / "out" / "table1.html").read_text()
    assert "<svg" in page
    assert "Not computed yet: simulating DoRA on llama2-7b" in page


def test_table_4_finds_lengths_by_bisection(small_models, tmp_path):
    words = ["reproduce", "table4", "--simulate", "--output", str(tmp_path / "out")]
    assert main([*words, "--only", "paca"]) == 0
    result = json.loads((tmp_path / "out" / "table4.json").read_text())["table4"]
    longest = result["lengths"]["llama3-8b-paca-r8"]
    setting = setting_of("table4", TABLES["table4"].row("llama3-8b-paca-r8"))
    setting = setting.but(model=small_models, seq_len=longest)
    assert estimate_memory(setting).high_bytes <= _AVAILABLE
    assert estimate_memory(setting.but(seq_len=longest + 1)).high_bytes > _AVAILABLE
    assert set(result["lengths"]) == {"llama3-8b-paca-r8", "llama3-8b-paca-r8-lean"}
    page = (tmp_path / "out" / "table4.md").read_text()
    assert f"| llama3-8b | PaCA | 8 | 9,800 | {longest:,} |" in page
    assert "lean activations (pacatune's default)" in page
