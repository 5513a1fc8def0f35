"""The choice of columns: the rule, its interface, its errors."""

import zlib

import pytest
import torch

from pacatune import selection
from pacatune.selection import register_strategy, seed_for, select_columns, strategies


@pytest.fixture
def weight():
    return torch.empty(5, 40, device="meta")


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(selection, "_STRATEGIES", dict(selection._STRATEGIES))


def test_random_follows_the_rule_of_peft_0_22(weight):
    """(random_seed + crc32(name)) mod 2^63 seeds randperm; the first r, sorted."""
    name = "model.layers.0.mlp.up_proj"
    seed = (42 + zlib.crc32(name.encode())) % 2**63
    assert seed_for(42, name) == seed
    assert seed_for(2**63 - 1, "a") == zlib.crc32(b"a") - 1
    generator = torch.Generator().manual_seed(seed)
    chosen = select_columns("random", weight, 6, seed=seed)
    assert torch.equal(chosen, torch.randperm(40, generator=generator)[:6].sort().values)
    assert chosen.untyped_storage().nbytes() == 6 * 8  # not the whole permutation


def test_neither_the_global_seed_nor_the_default_device_matters(weight):
    chosen = []
    for seed, device in ((0, "cpu"), (1, "meta")):
        torch.manual_seed(seed)
        with torch.device(device):
            chosen.append(select_columns("random", weight, 6, seed=3))
    assert torch.equal(*chosen)


def test_a_strategy_can_be_added(weight, registry):
    @register_strategy("first")
    def first(weight, statistics, rank, generator):
        return torch.arange(rank).flip(0)

    assert strategies() == ["first", "random"]
    assert select_columns("first", weight, 3, seed=0).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"'first'\) is already a selection strategy"):
        register_strategy("first")(first)


@pytest.mark.parametrize("columns", [[0, 0, 1], [0, 1], [0, 1, 40], [-1, 0, 1]])
def test_what_a_strategy_returns_is_checked(weight, registry, columns):
    register_strategy("broken")(lambda *args: torch.tensor(columns))
    with pytest.raises(ValueError, match=r"'broken'\) must return 3 distinct columns"):
        select_columns("broken", weight, 3, seed=0)


def test_unknown_strategy(weight):
    with pytest.raises(ValueError, match=r"`selection` \('best'\) must be one of \['random'\]"):
        select_columns("best", weight, 3, seed=0)
