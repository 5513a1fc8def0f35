"""Grouped attention that keeps no repeated heads."""

import pytest
import torch
from torch.nn import functional as F

from pacatune.lean import attend
from pacatune.lean.attention import repeat_heads
from tests.lean.twins import assert_within_own_error, run

B, H, K, T, D = 2, 6, 2, 7, 4


def make(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = {"query": H, "key": K, "value": K}
    return {
        # as projections give them: heads are not the outer dimension in memory
        name: torch.randn(B, T, heads, D, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        for name, heads in sizes.items()
    }


def make_mask(kind, dtype):
    seen = torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T).clone()
    seen[0, :, :, :2] = False
    seen[0, :, :2, 0] = True
    if kind == "bool":
        return seen
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def attention(kind, dtype, dropout=0.0):
    mask = None if kind == "causal" else make_mask(kind, dtype)

    def apply(query, key, value):
        torch.manual_seed(0)
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=mask is None, scale=0.3
        )

    return apply


def plain(query, key, value, apply):
    times = query.shape[1] // key.shape[1]
    return apply(query, repeat_heads(key, times), repeat_heads(value, times))


@pytest.mark.parametrize("kind", ["causal", "bool", "additive"])
def test_gradcheck(kind):
    tensors = tuple(x.requires_grad_() for x in make().values())
    apply = attention(kind, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, apply), tensors, fast_mode=True)


@pytest.mark.parametrize("kind", ["causal", "bool", "additive"])
@pytest.mark.parametrize(
    "trained", [{"query", "key", "value"}, {"query"}, {"key"}, {"value", "key"}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_plain(kind, trained, dtype):
    tensors, apply = make(dtype), attention(kind, dtype)
    ours, _ = run(lambda **x: attend(**x, apply=apply), tensors, trained)
    theirs, _ = run(lambda **x: plain(**x, apply=apply), tensors, trained)
    wide = {name: x.double() for name, x in tensors.items()}
    exact, _ = run(lambda **x: plain(**x, apply=attention(kind, torch.float64)), wide, trained)
    assert torch.equal(ours["y"], theirs["y"])
    assert_within_own_error(ours, theirs, exact)


def test_dropout_is_the_same_in_both_directions():
    tensors, apply = make(torch.float32), attention("bool", torch.float32, dropout=0.5)
    trained = {"query", "key", "value"}
    ours, _ = run(lambda **x: attend(**x, apply=apply), tensors, trained)
    theirs, _ = run(lambda **x: plain(**x, apply=apply), tensors, trained)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected)


def test_bytes_kept():
    tensors, apply = make(torch.bfloat16), attention("causal", torch.bfloat16)
    trained = {"query", "key", "value"}
    _, ours = run(lambda **x: attend(**x, apply=apply), tensors, trained)
    _, theirs = run(lambda **x: plain(**x, apply=apply), tensors, trained)
    heads, sums = B * T * D * 2, B * H * T * 4
    assert ours == (2 * H + 2 * K) * heads + sums
    assert theirs == 4 * H * heads + sums


def test_the_graph_holds_nothing_when_hooks_take_what_is_kept():
    """Non-reentrant checkpointing and offloading rely on it."""
    tensors = {name: x.requires_grad_() for name, x in make(torch.float32).items()}
    kept = []

    def pack(x):
        kept.append(x.detach().clone())
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, kept.__getitem__):
        doubled = {name: 2 * x for name, x in tensors.items()}
        y = attend(**doubled, apply=attention("causal", torch.float32))
    addresses = [x.untyped_storage()._weak_ref() for x in (*doubled.values(), y)]
    expected = torch.autograd.grad(
        plain(**{n: 2 * x for n, x in tensors.items()}, apply=attention("causal", torch.float32))
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


def test_tensors_without_memory_are_told_apart():
    """Estimates run on them."""
    tensors = {name: x.to("meta").requires_grad_() for name, x in make(torch.float32).items()}
    apply, kept = attention("causal", torch.float32), []

    def pack(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attend(**tensors, apply=lambda q, k, v: apply(q, k, v).tanh())
    # query, key, value, the output of tanh, and what the backend keeps beside them
    assert len(kept) > 4
    assert sum(x.shape[1:2] == (H,) and x.dim() == 4 for x in kept) >= 2


def test_autocast():
    tensors, apply = make(torch.float32), attention("causal", torch.bfloat16)
    trained = {"query", "key", "value"}
    with torch.autocast("cpu", torch.bfloat16):
        ours, kept = run(lambda **x: attend(**x, apply=apply), tensors, trained)
        theirs, _ = run(lambda **x: plain(**x, apply=apply), tensors, trained)
    assert torch.equal(ours["y"], theirs["y"])
    assert ours["query"].dtype == torch.float32
    torch.testing.assert_close(ours["key"], theirs["key"], atol=0.03, rtol=0.03)
    assert kept == (2 * H + 2 * K) * B * T * D * 2 + B * H * T * 4


def test_without_gradients_nothing_is_kept():
    tensors, apply = make(torch.float32), attention("bool", torch.float32)
    ours, kept = run(lambda **x: attend(**x, apply=apply), tensors, set())
    theirs, _ = run(lambda **x: plain(**x, apply=apply), tensors, set())
    assert torch.equal(ours["y"], theirs["y"])
    assert kept == 0


def test_retained_graph():
    tensors = {name: x.requires_grad_() for name, x in make().items()}
    y = attend(**tensors, apply=attention("bool", torch.float64)).sum()
    first = torch.autograd.grad(y, tuple(tensors.values()), retain_graph=True)
    second = torch.autograd.grad(y, tuple(tensors.values()))
    assert all(map(torch.equal, first, second))


def test_errors():
    tensors = make()
    apply = attention("causal", torch.float64)
    with pytest.raises(ValueError, match="`key` has 4 heads, which must divide the 6 heads"):
        attend(tensors["query"], tensors["query"][:, :4], tensors["query"][:, :4], apply)
    query = tensors["query"].requires_grad_()
    y = attend(query, tensors["key"], tensors["value"], apply)
    with pytest.raises(RuntimeError, match="A lean module has no second derivative"):
        torch.autograd.grad(y.sum(), query, create_graph=True)
