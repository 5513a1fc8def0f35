"""The choice of columns: the rule, its interface, its errors."""

import zlib

import pytest
import torch

from pacatune.selection import register_strategy, seed_for, select_columns, strategies


@pytest.fixture
def weight():
    return torch.empty(5, 40, device="meta")


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


@pytest.mark.parametrize("columns", [[0, 0, 1], [0, 1], [0, 1, 40], [-1, 0, 1]])
def test_what_a_strategy_returns_is_checked(weight, own_strategies, columns):
    register_strategy("broken")(lambda *args: torch.tensor(columns))
    with pytest.raises(ValueError, match=r"'broken'\) must return 3 distinct columns"):
        select_columns("broken", weight, 3, seed=0)


def test_each_strategy_takes_what_its_name_says():
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.5], [0.0, 1.0, -2.0, 0.5]])  # norms 3, 1.4, 2.8, 0.7
    statistics = {"gradient": torch.tensor([1.0, 5.0, 0.0, 7.0], dtype=torch.float64)}
    expected = {"weight_norm": [0, 2], "weight_norm_smallest": [1, 3], "gradient": [1, 3]}
    for name, columns in expected.items():
        chosen = select_columns(name, weight, 2, seed=0, statistics=statistics)
        assert chosen.tolist() == columns, name
    # Ties go to the first column.
    equal = {"gradient": torch.ones(300, dtype=torch.float64)}
    chosen = select_columns("gradient", torch.empty(1, 300), 3, seed=0, statistics=equal)
    assert chosen.tolist() == [0, 1, 2]


def test_a_strategy_can_be_added_and_gets_what_it_needs(own_strategies):
    """What was collected, and the layer's own random numbers."""
    seen = []

    @register_strategy("product", needs=("gradient",))
    def product(weight, statistics, rank, generator):
        seen.append((weight.is_meta, generator.initial_seed()))
        return statistics["gradient"].neg().topk(rank).indices.flip(0)

    assert strategies() == ["gradient", "product", "random", "weight_norm", "weight_norm_smallest"]
    statistics = {"gradient": torch.tensor([1.0, 3, 2])}
    weight = torch.empty(2, 3, device="meta")
    chosen = select_columns("product", weight, 2, seed=5, statistics=statistics)
    assert chosen.tolist() == [0, 2]
    assert seen == [(True, 5)]
    for name, needs, message in (
        ("product", (), r"'product'\) is already a selection strategy"),
        ("fixed", (), r"'fixed'\) is already a selection strategy"),
        ("broken", ("weights",), r"`needs` \(\['weights'\]\) must be among \('weight', "),
    ):
        with pytest.raises(ValueError, match=message):
            register_strategy(name, needs=needs)(product)
