"""The estimated step times: a small run is complete, and its table says what it is."""

import json

from benchmarks import roofline, tables
from tests.measure.real_step import LLAMA, write_config


def test_complete_result(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "SIZES", ((1, 8),))
    model = write_config(tmp_path, LLAMA)
    roofline.main(["--output", str(tmp_path), "--model", model])
    result = json.loads((tmp_path / "roofline.json").read_text())
    assert len(result["rows"]) == len(roofline.ADAPTERS) * len(roofline.COMPARED)
    assert all(row["step_ms"] > 0 for row in result["rows"])
    assert "not a measurement" in result["note"]
    lines = tables.table("roofline", tmp_path).splitlines()
    assert lines[0].startswith("| estimated step, ms (PaCA's share) | paca | lora |")
    assert lines[2].startswith("| 1 x 8 tokens, bfloat16 adapters |")
    assert "estimated by a roofline and not measured" in lines[-1]
