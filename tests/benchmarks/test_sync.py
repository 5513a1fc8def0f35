"""The benchmark of syncs: a small run is complete, and its sizes are what they must be."""

from benchmarks import sync, tables
from benchmarks.results import read

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 100}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
SHORT = {"RANK": 2, "NUM_ROUNDS": 1, "NUM_CYCLES": 20, "LEARNING_RATE": 1e-4}


def test_a_small_run(tmp_path, monkeypatch):
    for name, value in {"VALUES": sync.VALUES | SMALL, **SHORT}.items():
        monkeypatch.setattr(sync, name, value)
    sync.main(["--output", str(tmp_path)])
    rows = read("sync", tmp_path).rows
    found = {(row.what, row.method, row.model): row.value for row in rows}
    outputs = 64 + 2 * 32 + 64 + 2 * 128 + 64
    sent = {method: found[sync.SENT, method, sync.SMALL] for method in sync.METHODS}
    assert sent["paca"] == outputs * 2 * 2
    assert sent["full"] == sent["lora"] > sent["lora-adapter"]
    assert 0 < found["changed by a step", "elements", ""] < 100
    assert found[sync.SENT, "paca", "llama3-8b"] == 2 * 2 * 43008 * 32
    assert found[sync.SENT, "full", "llama3.1-70b"] == 2 * 70_553_706_496
    changed = "changed elements of the base"
    assert found[changed, "lora", ""] > 0
    assert found[changed, "paca", ""] == found["mean change", "paca", ""] == 0
    text = tables.block("sync", tmp_path)
    assert "`paca`: PaCA's columns." in text
    assert text.endswith("wrote `benchmarks/results/sync.json`.")
    assert "| paca | 0.00 | 0.00 |" in tables.block("sync-drift", tmp_path)


def test_what_a_step_changes_is_not_counted():
    """How many elements that are depends on the weights and tokens."""
    found = {row.model: row.origin for row in read("sync").rows if row.method == "elements"}
    assert "counted" not in found.values()
    large = {row.method: row.origin for row in sync.count("llama3-8b", 16, share=0.5)}
    assert large.pop("elements") == "simulated"
    assert {*large.values()} == {"counted"}
