"""The benchmark of patches: a small run is complete, and its sizes are what they must be."""

from benchmarks import patch, tables
from benchmarks.results import read

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 100}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def test_a_small_run(tmp_path, monkeypatch):
    monkeypatch.setattr(patch, "VALUES", patch.VALUES | SMALL)
    monkeypatch.setattr(patch, "RANK", 2)
    patch.main(["--output", str(tmp_path)])
    rows = read("patch", tmp_path).rows
    size = {row.method: row.value for row in rows if row.what == "written"}
    outputs = 64 + 2 * 32 + 64 + 2 * 128 + 64
    columns = size["changed columns, once"]
    assert columns == outputs * 2 * 2
    assert size["patch file"] > size["patch file, --no-adapter"] > 2 * columns
    assert columns < size["apply in place"] < size["checkpoint"] + 4096
    assert all(row.value > 0 for row in rows if row.what == "time")
    # How often each was timed, in the committed result as well.
    in_files = dict.fromkeys(("patch file", "apply to a new folder", "merge --no-verify"), 3)
    in_memory = dict.fromkeys(("apply in memory", "revert in memory"), 5)
    for one in (rows, read("patch").rows):
        found = {row.method: row.n for row in one if row.what == "time"}
        assert found == in_files | in_memory | {"apply in place": 6}
    text = tables.block("patch", tmp_path)
    assert "| apply in memory | " in text
    assert text.endswith("wrote `benchmarks/results/patch.json`.")
