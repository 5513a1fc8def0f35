"""The benchmark of patches: a small run is complete, and its sizes are what they must be."""

import json

from benchmarks import patch, tables

SMALL = ["--hidden-size", "64", "--intermediate-size", "128", "--num-layers", "1"]


def test_a_small_run(tmp_path):
    patch.main(["--output", str(tmp_path), *SMALL, "--vocab-size", "100", "--rank", "2"])
    result = json.loads((tmp_path / "patch.json").read_text())
    (row,) = result["rows"]
    outputs = 4 * 64 + 2 * 128 + 64
    assert row["columns_bytes"] == outputs * 2 * 2
    assert row["num_tensors"] == 7
    assert row["file_bytes"] > row["file_without_adapter_bytes"] > 2 * row["columns_bytes"]
    assert row["columns_bytes"] < row["page_bytes"] < row["checkpoint_bytes"] + 4096
    assert row["llama3_8b_columns_bytes"] == 16 // 8 * 43008 * 32 * 2
    assert all(value > 0 for name, value in row.items() if name.endswith("_s"))
    text = tables.table("patch", tmp_path)
    assert "| apply in memory | " in text
    assert text.endswith("wrote `benchmarks/results/patch.json`.")
