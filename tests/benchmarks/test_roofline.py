"""The estimated step times: a small run is complete, and its table says what it is."""

from benchmarks import roofline, tables
from benchmarks.results import read
from tests.measure.real_step import LLAMA, write_config


def test_complete_result(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "SIZES", ((1, 8),))
    monkeypatch.setattr(roofline, "MODEL", write_config(tmp_path, LLAMA))
    roofline.main(["--output", str(tmp_path)])
    rows = read("roofline", tmp_path).rows
    assert len(rows) == len(roofline.ADAPTERS) * len(roofline.COMPARED)
    for row in rows:  # sums of the same times in another order differ in their last bits
        assert 0 < row.low <= row.value * (1 + 1e-9) <= row.high * (1 + 2e-9)
    assert {row.origin for row in rows} == {"simulated"}
    lines = tables.block("roofline", tmp_path).splitlines()
    assert lines[0].startswith("| setting | paca, ms | lora, ms |")
    assert lines[2].startswith("| 1 x 8 tokens, bfloat16 adapters |")
    assert "estimated by a roofline and not measured" in lines[-1]
