"""The benchmark of switching adapters: a small run is complete, and nothing is written."""

from contextlib import nullcontext

import pytest
import torch

from benchmarks import switch, tables
from benchmarks.results import read
from benchmarks.step import count_column_writes
from pacatune import resident


@pytest.fixture(autouse=True)
def _two_layers(monkeypatch):
    monkeypatch.setattr(switch, "CHAIN_BYTES", 0)


def test_small_run_measures_and_counts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(switch, "SHAPES", ((32, 16),))
    options = "--tokens 6 --seconds 0 --min-rounds 2 --warmup 1 --threads 1 --dtypes float32"
    switch.main(["--output", str(tmp_path), *options.split(), "bfloat16"])
    rows = read("switch", tmp_path).rows
    times = [row for row in rows if row.unit == "ms"]
    assert [row.method for row in times] == ["paca", "lora"] * 2
    assert all(row.value > 0 and row.n == 2 for row in times)
    ratios = [row for row in rows if row.unit == "ratio"]
    assert [row.method for row in ratios] == ["paca / lora"] * 2
    assert "weight 32 x 16, 6 tokens, bfloat16" in capsys.readouterr().out
    first = tables.block("switch", tmp_path).splitlines()[0]
    assert first == "| setting | paca, ms | paca / lora |"


@pytest.mark.parametrize("method", switch.COMPARED)
def test_every_run_switches_to_the_other_adapter_and_writes_nothing(method):
    """R2a: unless a model is resident."""
    model = switch.make_model((8, 16), method, torch.float32, seed=0)
    inputs = [torch.randn(3, 16) for _ in range(2)]
    run, seen = switch.make_run(model, inputs), []
    for _ in range(4):
        run()
        seen.append(model(inputs)[0])
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.allclose(seen[0], seen[1])
    for is_resident in (False, True) if method == "paca" else ():
        with resident(model) if is_resident else nullcontext():
            run()
            with count_column_writes() as num_writes:
                run()
        assert num_writes() == 4 * is_resident
