"""The benchmark of syncs: a small run is complete, and its sizes are what they must be."""

import json

from benchmarks import sync, tables

SMALL = ["--hidden-size", "64", "--intermediate-size", "128", "--num-layers", "1"]
SMALLER = ["--num-heads", "4", "--num-groups", "2", "--vocab-size", "100", "--rank", "2"]
SHORT = ["--rounds", "1", "--cycles", "20", "--learning-rate", "1e-4"]


def test_a_small_run(tmp_path):
    sync.main(["--output", str(tmp_path), *SMALL, *SMALLER, *SHORT])
    result = json.loads((tmp_path / "sync.json").read_text())
    rows = {row["method"]: row for row in result["rows"]}
    outputs = 64 + 2 * 32 + 64 + 2 * 128 + 64
    assert rows["paca"]["bytes"] == rows["paca"]["kept_bytes"] == outputs * 2 * 2
    assert rows["paca"]["positions_bytes"] == 7 * 2 * 8
    assert rows["full"]["bytes"] == rows["lora"]["bytes"] > rows["lora-adapter"]["bytes"]
    assert 0 < result["changed_share"] < 1
    sizes = {(row["model"], row["method"]): row["bytes"] for row in result["computed"]}
    assert sizes["llama3-8b", "paca"] == 2 * 2 * 43008 * 32
    assert sizes["llama3.1-70b", "full"] == 2 * 70_553_706_496
    lora, paca = result["drift"]
    assert lora["changed_elements"] > 0
    assert paca["changed_elements"] == paca["drift_of_mean"] == 0
    text = tables.table("sync", tmp_path)
    assert "| PaCA's columns | " in text
    assert "PaCA's in 0." in text
    assert text.endswith("wrote `benchmarks/results/sync.json`.")
