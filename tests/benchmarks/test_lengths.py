"""The longest sequences, of a small model."""

from benchmarks import lengths
from benchmarks.results import RESULTS, read


def test_a_small_model_has_the_rows_of_the_committed_result(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(lengths, "MODEL", str(tiny_model_dir))
    monkeypatch.setattr(lengths, "gpu_bytes", lambda name: 2**30)
    lengths.main(["--output", str(tmp_path)])
    found, committed = (
        {(row.what, row.method, row.setting): row.value for row in read("lengths", folder).rows}
        for folder in (tmp_path, RESULTS)
    )
    assert found.keys() == committed.keys()
    for rows in (found, committed):
        for what, sign in (("longest sequence", 1), ("kept per token", -1)):
            values = [sign * rows[what, name, "level 1"] for name in ("paca", "lora_bf16", "lora")]
            assert values == sorted(values, reverse=True)
