"""Attention that keeps no repeated heads, and transformers' registry of such functions."""

import pytest
import torch

from pacatune import lean
from pacatune.lean.attention import attend, find_registry
from tests.lean.functions import CASES, plain_attention, sdpa
from tests.lean.models import adapted, build, gradients
from tests.ops.twin import cast, leaves_of
from tests.releases import needs


def test_the_graph_holds_nothing_when_hooks_take_what_is_kept():
    """Non-reentrant checkpointing and offloading rely on it."""
    tensors = cast(CASES["attention, causal"].tensors, torch.float32)
    tensors = leaves_of(tensors, tensors)
    kept = []

    def pack(x):
        kept.append(x.detach().clone())
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, kept.__getitem__):
        doubled = {name: 2 * x for name, x in tensors.items()}
        y = attend(**doubled, apply=sdpa("causal"))
    addresses = [x.untyped_storage()._weak_ref() for x in (*doubled.values(), y)]
    expected = torch.autograd.grad(
        plain_attention(**{n: 2 * x for n, x in tensors.items()}, apply=sdpa("causal"))
        .square().sum(),
        tuple(tensors.values()),
    )  # fmt: skip
    loss = y.square().sum()
    del doubled
    y_reference = addresses.pop()
    assert all(torch.UntypedStorage._expired(reference) for reference in addresses)
    del y
    assert not torch.UntypedStorage._expired(y_reference)  # the square keeps it
    found = torch.autograd.grad(loss, tuple(tensors.values()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "is_bias_trained", [pytest.param(True, marks=needs("transformers", "5.14")), False]
)
def test_attention_with_a_bias(is_bias_trained):
    """A bias that is learned gets its gradient; one that is not changes nothing."""
    model = build("Llama")
    attention = model.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(1, 4, 6, 6, generator=generator).requires_grad_(is_bias_trained)
    results = []
    for is_lean in (False, True):
        if is_lean:
            lean.enable(model)
        query, key, value = (
            torch.randn(2, heads, 6, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
            for heads in (4, 2, 2)
        )
        mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
        inputs = [query, key, value, *([bias] if is_bias_trained else [])]
        apply = find_registry()["sdpa"]
        y, _ = apply(attention, query, key, value, mask, position_bias=bias, scaling=0.3)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_somebody_elses_attention_function_is_called(batch):
    registry, before, calls = find_registry(), find_registry()["sdpa"], []

    def other(*args, **kwargs):
        calls.append(args)
        return getattr(before, "plain", before)(*args, **kwargs)

    registry["sdpa"] = other
    try:
        model = adapted()
        for _ in range(2):
            lean.enable(model)
        assert registry["sdpa"].plain is other
        gradients(model, batch)
        assert calls
    finally:
        registry["sdpa"] = before


def test_a_mask_is_made_additive_once(batch):
    model = adapted(dtype=torch.bfloat16)
    lean.enable(model)
    shapes = []

    def pack(x):
        if x.dim() == 4 and x.shape[-2:] == (20, 20):
            shapes.append(x.untyped_storage().data_ptr())
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(**batch)
    assert len(shapes) == 2
    assert len(set(shapes)) == 1
