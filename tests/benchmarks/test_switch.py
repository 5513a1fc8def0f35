"""The benchmark of switching adapters: a small run is complete, and its counts are exact."""

import pytest
import torch

from benchmarks import switch, tables
from benchmarks.results import read
from benchmarks.switch import Setting
from pacatune import resident

QUICK = ["--seconds", "0", "--min-rounds", "2", "--warmup", "1", "--threads", "1"]
SETTING = Setting(out_features=8, in_features=16, num_tokens=3, dtype="float32", num_layers=2)


def test_small_run_measures_and_counts(tmp_path, capsys):
    options = ["--output", str(tmp_path), "--tokens", "6", "--shapes", "32x16", "--num-layers", "3"]
    switch.main([*options, *QUICK, "--dtypes", "float32", "bfloat16"])
    rows = read("switch", tmp_path).rows
    writes = [row for row in rows if row.what == "column writes per layer"]
    assert [row.method for row in writes] == ["paca", "lora"] * 2
    assert {row.value for row in writes} == {0}
    for what in ("step", "set adapter", "first forward", "forward"):
        times = [row for row in rows if row.what == what and row.unit != "ratio"]
        assert len(times) == 4
        assert all(row.value > 0 and row.n == 2 for row in times)
    ratios = [row for row in rows if row.unit == "ratio"]
    assert [row.method for row in ratios] == ["paca / lora"] * 2
    assert "weight 32 x 16, 6 tokens, bfloat16" in capsys.readouterr().out
    first = tables.block("switch", tmp_path).splitlines()[0]
    assert first == "| setting | paca, ms | paca / lora |"


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "paca", "full"], "invalid choice: 'full'"),
        (["--shapes", "512"], "must be OUTxIN, such as 512x1408, got '512'"),
    ],
)
def test_wrong_options_are_explained(options, message, capsys):
    with pytest.raises(SystemExit):
        switch.parse(options)
    assert message in capsys.readouterr().err
