"""The benchmark of syncs: a small run is complete, and says of each method what must be so."""

from benchmarks import rl_sync, tables
from benchmarks.results import read


def test_a_small_run(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(rl_sync, "base_path", lambda: str(tiny_model_dir))
    monkeypatch.setattr(rl_sync, "RANK", 2)
    rl_sync.main(["--quick", "--threads", "1", "--output", str(tmp_path)])
    # Nothing that was measured as a whole is overwritten.
    (tmp_path / "rl_sync-part.json").rename(tmp_path / "rl_sync.json")
    rows = read("rl_sync", tmp_path).rows
    found = {(row.what, row.method, row.model or row.setting): row.value for row in rows}

    # What is sent.
    methods = [method for method in rl_sync.METHODS if method != "base"]
    sent = {method: found[rl_sync.SENT, method, rl_sync.MODEL] for method in methods}
    assert sent["paca"] < sent["lora-adapter"]
    assert sent["full"] == sent["lora"] == sent["swap"] > sent["lora-adapter"]
    assert 0 < found["changed by a step", "elements", ""] < 100
    assert found[rl_sync.SENT, "paca", "llama3-8b"] == 2 * 2 * 43008 * 32
    assert found[rl_sync.SENT, "full", "llama3.1-70b"] == 2 * 70_553_706_496

    # Columns alone are the trainer's bits, and leave the base.
    for method in ("base", "paca", "swap"):
        assert found["largest gap, same tokens", method, "transformers"] == 0
    assert found["gap, same tokens", "lora", "transformers"] > 0
    changed = "changed elements of the base"
    assert found[changed, "paca", ""] == 0
    assert found[changed, "lora", ""] > found[changed, "swap", ""] > 0

    assert "\n| paca |" in tables.block("rl-sync", tmp_path)
    lines = tables.block("rl-gap", tmp_path).splitlines()
    assert any(line.startswith("`base`: ") and "; `paca`: PaCA's columns" in line for line in lines)
    assert next(line for line in lines if line.startswith("| paca |")).endswith("| 0 | 0 |")


def test_shares_measured_here_are_simulated_elsewhere():
    large = {row.method: row.origin for row in rl_sync.count("llama3-8b", 16, share=0.5)}
    assert large.pop("elements") == "simulated"
    assert {*large.values()} == {"counted"}
