"""The comparison with the paper: small runs are right, and the committed one says what docs say."""

import json

import pytest

from benchmarks import estimate, estimate_tables, tables
from pacatune.experiments.reproduce.simulation import setting_of, tokens_for
from pacatune.measure.device import gpu_bytes
from pacatune.measure.estimate import estimate_memory
from pacatune.paper import TABLES
from tests.measure.real_step import LLAMA, tiny, write_config


@pytest.fixture
def committed():
    return json.loads((tables.RESULTS / "estimate.json").read_text(encoding="utf-8"))


def test_rows_compare_what_the_settings_take(tmp_path, monkeypatch):
    model = write_config(tmp_path, LLAMA, vocab_size=65536)
    line = TABLES["table1"].row("llama3-8b-lora-r8")
    monkeypatch.setattr(
        estimate, "setting_of", lambda table, row: setting_of(table, row).but(model=model)
    )
    monkeypatch.setattr(estimate, "_rows", lambda table: [line])
    (row,) = estimate.rows_of_table_1()
    setting = setting_of("table1", line).but(model=model)
    assert (setting.dropout, setting.batch_size, setting.lean) == (0.1, 2, "off")
    peak = estimate_memory(setting).peak_bytes
    assert row["simulated_gb"] == round(peak / 1e9, 2) > 0.5
    assert row["difference"] == round(peak / 27e9 - 1, 3)


def test_tokens_that_explain_an_amount(tmp_path):
    setting = tiny(tmp_path)
    num_bytes = estimate_memory(setting.but(batch_size=1, seq_len=700)).peak_bytes
    assert tokens_for(setting, num_bytes) == pytest.approx(700, rel=0.01)


def test_longest_fits(tmp_path):
    setting = tiny(tmp_path, batch_size=2)
    row = estimate._longest(setting, gpu_bytes("t4"), 20000)
    longest = row["max_seq_len"]
    assert estimate_memory(setting.but(seq_len=longest)).high_bytes <= gpu_bytes("t4")
    assert estimate_memory(setting.but(seq_len=longest + 1)).high_bytes > gpu_bytes("t4")
    assert row["difference"] == round(longest / 20000 - 1, 3)


def test_every_cell_of_table_1_is_within_ten_per_cent(committed):
    rows = committed["table_1"]
    assert {(r["model"], r["method"], r["rank"]): r["paper_gb"] for r in rows} == {
        (row.model, row.method, row.rank): row.values["memory"] for row in estimate._rows("table1")
    }
    assert all(-0.1 < row["difference"] < 0 for row in rows)


def test_one_number_of_tokens_explains_both_methods_of_table_3(committed):
    rows = committed["table_3"]
    assert {(r["model"], r["method"]): r["paper_gb"] for r in rows} == {
        (row.model, row.method): row.values["memory"] for row in estimate._rows("table3")
    }
    for model in ("llama3-8b", "llama3.1-70b"):
        tokens = [r["tokens_that_explain_it"] for r in rows if r["model"] == model]
        assert max(tokens) / min(tokens) < 1.1
        assert max(tokens) < next(r["tokens"] for r in rows if r["model"] == model)


def test_lengths_of_table_4_are_reached_without_lean(committed):
    rows = [row for row in committed["table_4"] if row["lean"] == "off" and row["dropout"] == 0]
    assert {row["method"]: row["paper"] for row in rows} == {
        row.method: row.values["length"] for row in TABLES["table4"].rows
    }
    assert all(0 <= row["difference"] < 0.15 for row in rows)


@pytest.mark.parametrize("number", ["1", "3", "4"])
def test_tables_show_every_row(number, committed):
    lines = estimate_tables.table(number, tables.RESULTS).splitlines()
    assert len(lines) == len(committed[f"table_{number}"]) + 4
    assert lines[-1].startswith("Paper: S. Woo et al.")
    assert tables.table(f"estimate-{number}") == "\n".join(lines)


def test_missing_result_says_how_to_make_it(tmp_path):
    assert estimate_tables.table("1", tmp_path).startswith("Not made yet: `python -m benchmarks.e")


def test_main_writes_everything(tmp_path, monkeypatch):
    for number in (1, 3, 4):
        monkeypatch.setattr(estimate, f"rows_of_table_{number}", lambda number=number: [number])
    path = estimate.main(["--output", str(tmp_path)])
    result = json.loads(path.read_text(encoding="utf-8"))
    assert [result[f"table_{number}"] for number in (1, 3, 4)] == [[1], [3], [4]]
    assert result["command"] == "python -m benchmarks.estimate"
    assert "torch" in result["versions"]
