"""The lean functions, what plain autograd has in their place, and tensors for them in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from pacatune.lean.attention import attend, repeat_heads
from pacatune.lean.gated import ACTIVATIONS, apply_gated_product
from pacatune.lean.loss import linear_cross_entropy
from pacatune.lean.norm import Norm, apply_norm
from pacatune.measure.counters import SavedBytes
from tests.ops import twin

B, H, K, T, D = 2, 6, 2, 7, 4
N, WIDTH, V = 11, 6, 9


@dataclass(frozen=True)
class Case:
    function: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    tensors: dict[str, Tensor | None]

    @property
    def floating(self):
        """Names of the tensors that may be trained."""
        return {n for n, x in self.tensors.items() if x is not None and x.is_floating_point()}


def run(function, tensors, trained):
    """Return output and gradients by name, and the bytes kept, inputs included."""
    saved = SavedBytes(torch.nn.Module())

    def counted(**given):
        with saved:
            return function(**given)

    return twin.gradients(counted, tensors, trained), saved.num_bytes


def _normal(**shapes):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def widened(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------- attention


def make_mask(kind, dtype):
    seen = torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T).clone()
    seen[0, :, :, :2] = False
    seen[0, :, :2, 0] = True
    if kind == "bool":
        return seen
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def sdpa(kind, dropout=0.0):
    def apply(query, key, value):
        mask = None if kind == "causal" else make_mask(kind, query.dtype)
        torch.manual_seed(0)
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=mask is None, scale=0.3
        )

    return apply


def plain_attention(query, key, value, apply):
    times = query.shape[1] // key.shape[1]
    return apply(query, repeat_heads(key, times), repeat_heads(value, times))


def attention(kind, **options):
    apply = sdpa(kind, **options)
    shapes = {name: (B, T, heads, D) for name, heads in (("query", H), ("key", K), ("value", K))}
    # as projections give them: heads are not the outer dimension in memory
    tensors = {name: x.transpose(1, 2) for name, x in _normal(**shapes).items()}
    return Case(partial(attend, apply=apply), partial(plain_attention, apply=apply), tensors)


# ---------------------------------------------------------------------- products and norms


def gated(activation, shape=(5, 6)):
    tensors = _normal(gate=shape, up=shape)
    tensors["gate"] *= 3
    return Case(
        partial(apply_gated_product, activation=ACTIVATIONS[activation]),
        lambda gate, up: ACTIVATIONS[activation].value(gate) * up,
        tensors,
    )


FORMS = {
    "llama": {"plus_one": False, "rounds_first": True},
    "gemma": {"plus_one": True, "rounds_first": False},
    "olmo2": {"plus_one": False, "rounds_first": False},
}


def plain_rms(x, weight, form):
    """As transformers write it."""
    hidden = widened(x)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
    if form == "llama":
        hidden = hidden.to(x.dtype)
        return hidden if weight is None else weight * hidden
    if weight is not None:
        hidden = hidden * (1.0 + widened(weight) if form == "gemma" else weight)
    return hidden.to(x.dtype)


def rms(form, shape=(2, 3, 8), has_weight=True):
    tensors = _normal(x=shape, weight=shape[-1:])
    if not has_weight:
        tensors["weight"] = None
    norm = Norm(1e-6, **FORMS[form])
    return Case(partial(apply_norm, bias=None, norm=norm), partial(plain_rms, form=form), tensors)


def plain_layer(x, weight, bias):
    y = F.layer_norm(widened(x), x.shape[-1:], widened(weight), widened(bias), 1e-5)
    return y.to(x.dtype)


def layer(shape=(5, 8)):
    norm = Norm(1e-5, centred=True, rounds_first=False)
    tensors = _normal(x=shape, weight=shape[-1:], bias=shape[-1:])
    return Case(partial(apply_norm, norm=norm), plain_layer, tensors)


# ---------------------------------------------------------------------- the loss


def cap(logits):
    return torch.tanh(widened(logits) / 3.0) * 3.0


def plain_loss(x, weight, target, bias=None, transform=None, **options):
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(logits if transform is None else transform(logits), target, **options)


def loss(ignored=(1, 4, 5), has_bias=True, **options):
    tensors = _normal(x=(N, WIDTH), weight=(V, WIDTH), bias=(V,))
    if not has_bias:
        tensors["bias"] = None
    target = torch.randint(V, (N,), generator=torch.Generator().manual_seed(0))
    target[list(ignored)] = -100
    return Case(
        partial(linear_cross_entropy, chunk_rows=4, **options),
        partial(plain_loss, **options),
        tensors | {"target": target},
    )


CASES = {
    **{f"attention, {kind}": attention(kind) for kind in ("causal", "bool", "additive")},
    **{f"product, {name}": gated(name) for name in ACTIVATIONS},
    **{f"product of {shape}": gated("silu", shape) for shape in [(6,), (2, 3, 6), (0, 6)]},
    **{f"rms_norm, {form}": rms(form) for form in FORMS},
    **{f"rms_norm, {form}, no weight": rms(form, has_weight=False) for form in FORMS},
    **{f"rms_norm of {shape}": rms("llama", shape) for shape in [(8,), (0, 8)]},
    **{f"layer_norm of {shape}": layer(shape) for shape in [(8,), (5, 8), (2, 3, 8), (0, 8)]},
    "loss": loss(),
    "loss, widened": loss(transform=widened),
    "loss, no bias": loss(has_bias=False),
    "loss, capped, smoothed": loss(transform=cap, label_smoothing=0.1),
    "loss, capped, sum": loss(transform=cap, reduction="sum"),
    **{
        f"loss, {11 - len(ignored)} rows": loss(ignored, transform=cap, reduction="sum")
        for ignored in ((), range(10), range(N))
    },
}
