"""The kernel that puts all columns: on a GPU, or by Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch

from pacatune.ops.columns import adapted_columns, read_columns, with_columns
from pacatune.ops.pattern import divide, expand
from pacatune.residency import put as put_module
from pacatune.residency.put import Put, Update, can_exchange, exchange, room_for
from pacatune.strategies import random_columns
from tests.residency.net import adapt, assert_base, deltas, layers

# O, I, R and row groups.
SHAPES = [(37, 50, 4, 1), (64, 33, 8, 1), (700, 64, 3, 1), (60, 33, 8, 4), (700, 64, 3, 7)]
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(
    not (IS_INTERPRETED or torch.cuda.is_available()),
    reason="Triton has neither a GPU nor its interpreter (TRITON_INTERPRET=1) here",
)
@pytest.mark.parametrize("delta_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_are_those_of_torch(dtype: torch.dtype, delta_dtype: torch.dtype | None) -> None:
    pytest.importorskip("triton")
    device = "cpu" if IS_INTERPRETED else "cuda"
    puts, expected, pretrained = [], [], []
    for out_features, in_features, rank, groups in SHAPES:
        weight = torch.randn(out_features, in_features).to(device, dtype)
        own = random_columns(in_features, rank, groups, "", groups)
        columns, places = (one if one is None else one.to(device) for one in divide(own))
        kept = room_for(weight, columns)
        originals = read_columns(weight, columns)
        delta = torch.randn(out_features, rank).to(device, delta_dtype or dtype)
        pretrained.append(weight.clone())
        adapted = adapted_columns(originals, expand(delta, places, len(columns)), 1.7)
        expected.append(with_columns(weight, columns, adapted))
        puts.append(Put(kept, Update(delta, 1.7, columns, 0, 0, 0, places)))
    exchange(puts, takes=True)
    exchange(puts)
    # The interpreter truncates where it makes bfloat16.
    atol = 0.04 if IS_INTERPRETED and dtype is torch.bfloat16 else 0.0
    for each, want in zip(puts, expected, strict=True):
        torch.testing.assert_close(each.kept.memory, want, rtol=0, atol=atol)
    exchange([each._replace(update=None) for each in puts])
    for each, want in zip(puts, pretrained, strict=True):
        assert torch.equal(each.kept.memory, want)


@pytest.mark.skipif(not IS_INTERPRETED, reason="needs Triton's interpreter (TRITON_INTERPRET=1)")
@pytest.mark.parametrize("is_negative", [True, False])
def test_columns_that_no_weight_has_are_not_written(is_negative, base, monkeypatch) -> None:
    """Whoever put them there: the kernel takes them as they are."""
    monkeypatch.setattr(put_module, "exchange", exchange)
    monkeypatch.setattr(put_module, "can_exchange", lambda memory, values: True)
    base = base.float()
    model, x = adapt(base), torch.randn(2, 10)
    model(x).sum().backward()
    torch.optim.SGD(deltas(model), 0.1).step()
    for layer in layers(model):
        place, column = (0, -1) if is_negative else (-1, layer.in_features)
        layer.paca_indices["default"][place] = column
    with pytest.raises(ValueError, match=r"`indices` holds (-1|10) at position [02]; .* to 9"):
        model(x)
    assert_base(base, model)


def test_where_it_cannot_be_used() -> None:
    weight, delta = torch.zeros(4, 4), torch.zeros(4, 2)
    assert not can_exchange(weight, delta)


def test_a_grid_ends_at_no_number_of_blocks_or_layers(monkeypatch) -> None:
    """CUDA allows 65,535 blocks on its second axis; a head of 262,144 tokens has more."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(put_module, "_kernel", Kernel)
    monkeypatch.setattr(put_module, "_triton_dtype", str)
    columns = torch.arange(257)
    head = Put(room_for(torch.empty(262_144, 300, device="meta"), columns), None)
    layers = [Put(room_for(torch.empty(4, 300, device="meta"), columns), None)] * 70_000
    exchange([head])
    exchange(layers)
    assert grids == [(262_144 * 257 // 1024,), (2 * 70_000,)]
