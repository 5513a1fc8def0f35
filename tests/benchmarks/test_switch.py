"""The benchmark of switching adapters: a small run is complete, and its counts are exact."""

import json

import pytest
import torch

from benchmarks import switch, tables
from benchmarks.layer import Setting
from pacatune import resident

QUICK = ["--seconds", "0", "--min-rounds", "2", "--warmup", "1", "--threads", "1"]
SETTING = Setting(out_features=8, in_features=16, num_tokens=3, dtype="float32", num_layers=2)


def test_small_run_measures_and_counts(tmp_path, capsys):
    options = ["--output", str(tmp_path), "--tokens", "6", "--shapes", "32x16", "--num-layers", "3"]
    switch.main([*options, *QUICK, "--dtypes", "float32", "bfloat16"])
    result = json.loads((tmp_path / "switch.json").read_text())
    assert result["command"].startswith("python -m benchmarks.switch --output ")
    assert [(row["dtype"], row["method"]) for row in result["rows"]] == [
        (dtype, method) for dtype in ("float32", "bfloat16") for method in ("paca", "lora")
    ]
    for row in result["rows"]:
        assert row["column_writes_per_layer"] == 0
        assert min(row[name] for name in ("set_adapter_us", "first_forward_us", "forward_us")) > 0
        assert row["num_rounds"] == 2
    assert [ratio["reference"] for ratio in result["ratios"]] == ["lora", "lora"]
    assert "| weight 32 x 16, 6 tokens, bfloat16 | lora" in capsys.readouterr().out
    assert tables.table("switch", tmp_path).splitlines()[0].endswith("| paca | lora |")


@pytest.mark.parametrize("method", switch.COMPARED)
def test_every_run_switches_to_the_other_adapter(method):
    model = switch.make_model(SETTING, method, seed=0)
    inputs = [torch.randn(3, 16) for _ in range(2)]
    run, seen = switch.make_run(model, inputs), []
    for _ in range(4):
        run()
        seen.append(model(inputs)[0])
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.allclose(seen[0], seen[1])


def test_a_write_is_refused():
    model = switch.make_model(SETTING, "paca", seed=0)
    inputs = [torch.randn(3, 16) for _ in range(2)]
    assert switch.count_writes(model, inputs) == 0
    message = r"switching writes 2.0 times .*; evaluation must not write"
    with resident(model), pytest.raises(RuntimeError, match=message):
        switch.count_writes(model, inputs)


def test_methods_without_adapters_are_refused():
    with pytest.raises(SystemExit, match=r"\['full'\] cannot be switched; choose from"):
        switch.parse(["--methods", "paca", "full"])
