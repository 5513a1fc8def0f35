"""The adapted nn.MultiheadAttention against torch's own with adapted weights."""

import itertools

import pytest
import torch
from torch import nn

from tests.tuner.attention_nets import (
    BATCH,
    BOTH,
    KEYS,
    LENGTH,
    NUM_HEADS,
    Reference,
    adapt,
    assert_equal,
    build,
    inputs,
)


@pytest.mark.parametrize("targets", [BOTH, ["attn"], ["out_proj"]], ids=["both", "in", "out"])
@pytest.mark.parametrize("kind", ["self", "cross", "three"])
@pytest.mark.parametrize("bias", [True, False])
def test_equal_to_reference(targets, kind: str, bias: bool) -> None:
    for batch_first, need_weights in itertools.product([True, False], repeat=2):
        base = build(bias=bias, batch_first=batch_first)
        model = adapt(base, target_modules=targets)
        kwargs = {"need_weights": need_weights}
        assert_equal(model, Reference(base, model), inputs(base, kind), kwargs)


@pytest.mark.parametrize(
    "options",
    [{"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}],
    ids=["bias_kv", "zero", "both"],
)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("is_masked", [True, False])
def test_appended_keys(options, need_weights: bool, is_masked: bool) -> None:
    base = build(batch_first=True, **options)
    model = adapt(base)
    kwargs = {"need_weights": need_weights, **(masks("bool", 2) if is_masked else {})}
    assert_equal(model, Reference(base, model), inputs(base, "cross"), kwargs)


def masks(kind: str, num_dims: int, is_batched: bool = True):
    generator = torch.Generator().manual_seed(2)
    batch = (BATCH if is_batched else 1) * NUM_HEADS
    shape = (LENGTH, KEYS) if num_dims == 2 else (batch, LENGTH, KEYS)
    attention = torch.rand(shape, generator=generator) < 0.3
    padding = torch.arange(KEYS) >= torch.tensor([[KEYS], [4], [5]])
    padding = padding if is_batched else padding[1]
    attention[..., 0] = False
    if kind == "float":
        attention = torch.zeros(shape, dtype=torch.float64).masked_fill(attention, -torch.inf)
        attention = attention + torch.randn(shape, generator=generator, dtype=torch.float64)
        padding = torch.zeros(padding.shape, dtype=torch.float64).masked_fill(padding, -torch.inf)
    return {"attn_mask": attention, "key_padding_mask": padding}


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("num_dims", [2, 3])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "which", [["attn_mask"], ["key_padding_mask"], ["attn_mask", "key_padding_mask"]]
)
def test_masks(kind: str, num_dims: int, need_weights: bool, which: list[str]) -> None:
    for batch_first, is_batched in ((True, True), (False, True), (False, False)):
        base = build(batch_first=batch_first)
        model = adapt(base)
        given = masks(kind, num_dims, is_batched)
        kwargs = {"need_weights": need_weights, **{name: given[name] for name in which}}
        args = inputs(base, "cross", is_batched)
        assert_equal(model, Reference(base, model), args, kwargs)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_causal_and_weights_of_heads(need_weights: bool, average: bool) -> None:
    base = build(batch_first=True)
    model = adapt(base)
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    kwargs = {
        "need_weights": need_weights,
        "average_attn_weights": average,
        "attn_mask": causal,
        "is_causal": True,
    }
    assert_equal(model, Reference(base, model), inputs(base, "self"), kwargs)
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        model(*inputs(base, "self"), is_causal=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_the_same_numbers(need_weights: bool) -> None:
    base = build(batch_first=True, dropout=0.3)
    model = adapt(base).train()
    reference = Reference(base, model).train()
    kwargs = {"need_weights": need_weights}
    assert_equal(model, reference, inputs(base, "self"), kwargs, seed=3)
    y = model(*inputs(base, "self"))[0]
    assert not torch.equal(model(*inputs(base, "self"))[0], y)
    model.eval()
    assert torch.equal(model(*inputs(base, "self"))[0], model(*inputs(base, "self"))[0])


def test_wrong_masks() -> None:
    model = adapt(build(batch_first=True))
    args = inputs(build(batch_first=True), "self")
    with pytest.raises(RuntimeError, match=r"here \(5, 5\) or \(12, 5, 5\), got shape \(1, 5\)"):
        model(*args, attn_mask=torch.zeros(1, 5))
    with pytest.raises(RuntimeError, match=r"A mask must be bool or floating, got torch.int64"):
        model(*args, attn_mask=torch.zeros(5, 5, dtype=torch.int64))
