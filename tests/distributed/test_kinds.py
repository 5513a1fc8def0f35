"""Adapted experts, embeddings and convolutions: two processes train what one does."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.distributed import net
from tests.distributed.ways import WRAPPINGS, train_copies, train_flat, train_shards
from tests.tuner import moe

pytestmark = pytest.mark.slow

EXPERTS = ["mixtral", "gpt_oss", "llama4"]
WIDTH = 12


class Convolutions(nn.Module):
    """On tokens as positions of images; no batch statistics, of which each process has its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(WIDTH, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(16, 8, 1, groups=2)
        self.wave = nn.Conv1d(8, WIDTH, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        image = x.mT.unflatten(2, (5, -1))
        y = F.silu(self.depthwise(F.silu(self.stem(image))))
        return x + self.wave(self.grouped(y).flatten(2)).mT


def encoder():
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True)


# Blocks over an embedding, and what is adapted.
BLOCKS = {
    "encoder": (encoder, ["embed", "linear1", "linear2"]),
    "convolutions": (Convolutions, ["stem", "depthwise", "grouped", "wave"]),
    "encoder, mixed": (encoder, ["linear1", "linear2"]),
}
KINDS = [*EXPERTS, *BLOCKS]


class Model(nn.Module):
    """Called as a language model is."""

    def __init__(self, block) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed = nn.Embedding(net.VOCAB_SIZE, WIDTH)
        self.model.layers = nn.ModuleList([block(), block()])
        self.head = nn.Linear(WIDTH, net.VOCAB_SIZE)

    def forward(self, input_ids):
        from transformers.modeling_outputs import CausalLMOutput

        x = self.model.embed(input_ids)
        for block in self.model.layers:
            x = block(x)
        return CausalLMOutput(logits=self.head(x))


def adapt(kind):
    if kind in EXPERTS:
        return moe.adapt(moe.build(kind), random=False)
    torch.manual_seed(0)
    block, targets = BLOCKS[kind]
    options = {"target_modules": targets, "target_parameters": None}
    if kind.endswith("mixed"):
        options["channels"] = 8
    return moe.adapt(Model(block).double(), random=False, **options)


@functools.cache
def train_one(kind):
    model = adapt(kind)
    return net.train(model), net.adapter_of(model)


@pytest.mark.parametrize(
    ("train", "kind", "options"),
    [
        *((train_copies, kind, {}) for kind in KINDS),
        *((train_shards, kind, {}) for kind in KINDS),
        *((train_shards, kind, {"reentrant": True}) for kind in ("mixtral", "gpt_oss")),
        (train_shards, "mixtral", {"reentrant": False}),
        *((train_flat, kind, WRAPPINGS[-1]) for kind in KINDS),
        *((train_flat, "mixtral", wrapping) for wrapping in WRAPPINGS[:-1]),
        (train_flat, "convolutions", WRAPPINGS[0]),
    ],
)
def test_losses_adapter_and_base(pair, train, kind, options):
    results = pair.run(train, adapt, kind=kind, **options)
    net.assert_equal_to_one(results, train_one(kind), atol=1e-5)
