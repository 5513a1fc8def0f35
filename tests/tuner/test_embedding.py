"""The adapted nn.Embedding with every option of torch's, and those that scale their rows (R1).

test_every_kind.py has all that every layer does.
"""

import copy

import pytest
import torch
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from tests.ops.twin import bytes_kept
from tests.tuner import nets
from tests.tuner.nets import Reference, assert_equal, evaluate

V, D, R = 11, 8, 3
SCALED = [Gemma3TextScaledWordEmbedding, BartScaledWordEmbedding]


class Net(nn.Module):
    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        self.head = nn.Linear(D, 4)

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


def build(kind=nn.Embedding, dtype=torch.float64, **options) -> Net:
    torch.manual_seed(0)
    return Net(kind(V, D, **options)).to(dtype)


def adapt(base: nn.Module) -> nn.Module:
    return nets.adapt(base, target_modules=["embed"], r=R)


def delta_of(model: nn.Module) -> nn.Parameter:
    return model.get_base_model().embed.delta_of("default")


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("shape", "kind", "options"),
    [
        ((), nn.Embedding, {}),
        ((0,), nn.Embedding, {}),
        ((2, 3, 4), nn.Embedding, {"padding_idx": 2}),
        ((9,), nn.Embedding, {"scale_grad_by_freq": True}),
        *(((2, 5), kind, {"embed_scale": 3.3, "padding_idx": 2}) for kind in SCALED),
    ],
)
def test_equal_to_reference(shape, kind, options) -> None:
    base = build(kind, **options)
    model, tokens = adapt(base), ids(*shape)
    assert_equal(model, Reference(base, model), tokens)
    unseen = torch.ones(V, dtype=torch.bool)
    unseen[tokens.flatten()] = False
    assert not delta_of(model).grad[unseen].any()


def test_sparse_gradient() -> None:
    base, tokens = build(sparse=True), ids(2, 3)
    model, dense = adapt(base), adapt(build())
    for which in (model, dense):
        which(tokens).square().sum().backward()
    gradient = delta_of(model).grad
    assert gradient.is_sparse
    assert set(gradient.coalesce().indices().flatten().tolist()) == set(tokens.flatten().tolist())
    torch.testing.assert_close(gradient.to_dense(), delta_of(dense).grad)
    torch.optim.SparseAdam([delta_of(model)], lr=0.1).step()


def test_nothing_but_ids_is_kept() -> None:
    model, tokens = adapt(build()), ids(2, 5)
    embed = model.get_base_model().embed
    given = [tokens, *model.parameters(), *model.buffers()]
    assert bytes_kept(lambda: embed(tokens), given) <= tokens.numel() * R * 8  # places, as int64


@pytest.mark.parametrize("kind", SCALED)
def test_embeddings_that_scale_are_merged_as_they_are_trained(kind) -> None:
    """In 16 bits, where the scale and the weight are rounded."""
    base = build(kind, torch.bfloat16, padding_idx=0, embed_scale=3.3)
    model, tokens = adapt(base), ids(30)
    y = evaluate(model.get_base_model().embed, tokens)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(y, evaluate(merged.embed, tokens), atol=4e-2, rtol=4e-2)
    assert not torch.allclose(y, evaluate(base.embed, tokens), atol=0.1)
