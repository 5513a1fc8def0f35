"""Saved statistics: what is read is what was written, and nothing else is read."""

import pytest
import torch
from safetensors.torch import save_file

from pacatune.selection import ColumnStatistics


def make(**changes):
    values = {"a.b": {"gradient": torch.rand(5).double()}}
    return ColumnStatistics(**{"values": values, "num_batches": 7, **changes})


def test_round_trip(tmp_path):
    statistics = make()
    statistics.save(tmp_path / "s.safetensors")
    loaded = ColumnStatistics.load(tmp_path / "s.safetensors")
    assert loaded.num_batches == 7
    assert loaded.values.keys() == {"a.b"}
    for kind, values in statistics.of("a.b").items():
        assert torch.equal(loaded.of("a.b")[kind], values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm": torch.ones(2)}, r"'a' have 'norm', .* must be 'gradient', a"),
        ({"gradient": torch.ones(2, 2)}, r"'gradient', \(2, 2\) of torch.float32; it must"),
        ({"gradient": torch.ones(2).long()}, r"'gradient', \(2,\) of torch.int64"),
        ({"gradient": torch.tensor([1.0, torch.nan])}, "a finite sum of squares"),
        ({"gradient": torch.tensor([1.0, -1.0])}, "a finite sum of squares"),
        ({}, r"`num_batches` \(0\) must be at least 1"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(ValueError, match=message):
        make(values={"a": values}, num_batches=7 if values else 0)


def test_files_of_another_kind(tmp_path):
    save_file({"a.gradient": torch.ones(2)}, tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="was not written by ColumnStatistics"):
        ColumnStatistics.load(tmp_path / "s.safetensors")
