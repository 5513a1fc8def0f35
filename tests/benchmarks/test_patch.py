"""The benchmark of patches: a small run is complete, and its sizes are what they must be."""

from benchmarks import patch, tables
from benchmarks.results import read

SMALL = ["--hidden-size", "64", "--intermediate-size", "128", "--num-layers", "1"]


def test_a_small_run(tmp_path):
    patch.main(["--output", str(tmp_path), *SMALL, "--vocab-size", "100", "--rank", "2"])
    rows = read("patch", tmp_path).rows
    size = {row.method: row.value for row in rows if row.what == "written"}
    outputs = 4 * 64 + 2 * 128 + 64
    columns = size["changed columns, once"]
    assert columns == outputs * 2 * 2
    assert size["patch file"] > size["patch file, --no-adapter"] > 2 * columns
    assert columns < size["apply in place"] < size["checkpoint"] + 4096
    (large,) = (row.value for row in rows if row.what == "columns of LLaMA3-8B")
    assert large == 16 // 8 * 43008 * 32 * 2
    assert all(row.value > 0 for row in rows if row.what == "time")
    text = tables.block("patch", tmp_path)
    assert "| apply in memory | " in text
    assert text.endswith("wrote `benchmarks/results/patch.json`.")
