"""A net with one MultiheadAttention, and what plain autograd makes of its adapted weights."""

import copy

import torch
from peft import get_peft_model
from torch import nn

from pacatune import PacaConfig
from pacatune.ops.reference import adapted_weight
from tests.tuner.moe import fill, layers

EMBED_DIM, NUM_HEADS, LENGTH, KEYS, BATCH = 12, 4, 5, 7, 3


BOTH = ["attn", "out_proj"]


class Net(nn.Module):
    """One attention and what it needs around it."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(EMBED_DIM, NUM_HEADS, dtype=torch.float64, **options)

    def forward(self, *args, **kwargs):
        return self.attn(*args, **kwargs)


def build(**options) -> Net:
    torch.manual_seed(0)
    net = Net(**options)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return net


def adapt(base: nn.Module, **options) -> nn.Module:
    options = {"target_modules": BOTH, "r": 3, "paca_alpha": 6, **options}
    model = get_peft_model(copy.deepcopy(base), PacaConfig(**options), autocast_adapter_dtype=False)
    fill(model)
    return model


class Reference(nn.Module):
    """Torch's own module, whose weights are made from the deltas in each call."""

    def __init__(self, base: nn.Module, model: nn.Module, adapter: str = "default") -> None:
        super().__init__()
        self.base = copy.deepcopy(base).requires_grad_(False)
        self.names = {
            "attn.in_proj_weight": "attn.in_proj_weight",
            "attn.out_proj": "attn.out_proj.weight",
        }
        self.layers = {n: layer for n, layer in layers(model).items() if adapter in layer.r}
        self.deltas = [
            layer.delta_of(adapter).detach().clone().requires_grad_()
            for layer in self.layers.values()
        ]
        self.adapter = adapter

    def forward(self, *args, **kwargs):
        parameters = dict(self.base.named_parameters())
        for (name, layer), delta in zip(self.layers.items(), self.deltas, strict=True):
            name = name if name in parameters else f"{name}.weight"
            columns, scaling = layer.paca_indices[self.adapter], layer.scaling[self.adapter]
            parameters[name] = adapted_weight(parameters[name], delta, columns, scaling)
        return torch.func.functional_call(self.base, parameters, args, kwargs)


def inputs(base: Net, kind: str, is_batched: bool = True):
    """Query, key and value of self-attention, of cross-attention, or three different tensors."""
    generator = torch.Generator().manual_seed(1)

    def normal(length: int) -> torch.Tensor:
        shape = (length, EMBED_DIM)
        if is_batched:
            shape = (BATCH, *shape) if base.attn.batch_first else (length, BATCH, EMBED_DIM)
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    query = normal(LENGTH)
    if kind == "self":
        return query, query, query
    key = normal(KEYS)
    return query, key, key if kind == "cross" else normal(KEYS)


def assert_equal(model, reference, args, kwargs, seed=None) -> None:
    """Outputs, attention weights and the gradients of inputs and deltas are equal."""
    results = []
    for which, deltas in (
        (model, [layer.delta_of("default") for layer in layers(model).values()]),
        (reference, reference.deltas),
    ):
        if seed is not None:
            torch.manual_seed(seed)
        for tensor in (*args, *deltas):
            tensor.grad = None
        y, weights = which(*args, **kwargs)
        loss = y.square().sum() + (0 if weights is None else weights.square().sum())
        loss.backward()
        results.append([y, weights, *(x.grad for x in (*args, *deltas))])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
