"""The benchmark of syncs: a small run is complete, and says of each method what must be so."""

import pytest

from benchmarks import rl_sync, tables
from benchmarks.results import read


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl-sync")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl_sync, "base_path", lambda: str(tiny_model_dir))
        patch.setattr(rl_sync, "RANK", 2)
        rl_sync.main(["--quick", "--threads", "1", "--output", str(folder)])
    # Nothing that was measured as a whole is overwritten.
    return (folder / "rl_sync-part.json").rename(folder / "rl_sync.json").parent


@pytest.fixture(scope="module")
def found(folder):
    return {
        (row.what, row.method, row.model or row.setting): row.value
        for row in read("rl_sync", folder).rows
    }


def test_what_is_sent(found):
    sent = {
        method: found[rl_sync.SENT, method, rl_sync.MODEL]
        for method in rl_sync.METHODS
        if method != "base"
    }
    assert sent["paca"] == sent["paca_g16"] < sent["lora-adapter"]
    assert sent["full"] == sent["lora"] == sent["swap"] > sent["lora-adapter"]
    assert 0 < found["changed by a step", "elements", ""] < 100
    assert found[rl_sync.SENT, "paca", "llama3-8b"] == 2 * 2 * 43008 * 32
    assert found[rl_sync.SENT, "full", "llama3.1-70b"] == 2 * 70_553_706_496


def test_columns_alone_are_the_trainers_bits_and_leave_the_base(found):
    for method in ("base", "paca", "paca_g16", "swap"):
        assert found["largest gap, same tokens", method, "transformers"] == 0
    assert found["gap, same tokens", "lora", "transformers"] > 0
    changed = "changed elements of the base"
    assert found[changed, "paca", ""] == found[changed, "paca_g16", ""] == 0
    assert found[changed, "lora", ""] > found[changed, "swap", ""] > 0


def test_tables(folder):
    assert "`paca`: PaCA's columns" in tables.block("rl-sync", folder)
    lines = tables.block("rl-gap", folder).splitlines()
    assert next(line for line in lines if line.startswith("| paca |")).endswith("| 0 | 0 |")


def test_shares_measured_here_are_simulated_elsewhere():
    large = {row.method: row.origin for row in rl_sync.count("llama3-8b", 16, share=0.5)}
    assert large.pop("elements") == "simulated"
    assert {*large.values()} == {"counted"}
