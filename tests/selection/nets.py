"""Small networks of every kind of target, and what plain autograd says about their gradients."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


class Net(nn.Module):
    """An embedding, convolutions, linear layers, Conv1D, attention: ids (B, 6) -> (B, 3)."""

    def __init__(self, sparse=False):
        super().__init__()
        self.embed = nn.Embedding(11, 8, sparse=sparse)
        self.conv = nn.Conv1d(8, 12, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(12)
        self.up = nn.Linear(12, 16)
        self.down = Conv1D(12, 16)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(12, 3)

    def forward(self, ids):
        x = self.embed(ids).transpose(1, 2)
        x = self.norm(self.conv(x)).transpose(1, 2)
        x = self.down(torch.relu(self.up(x)))
        x = self.up(x).mean(-1, keepdim=True) + x  # a layer that is used twice
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.drop(x.mean(1)))


TARGETS = ["embed", "conv", "up", "down"]


def build(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**options).double().eval()


def make_batches(number=4, size=3):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randint(0, 11, (size, 6), generator=generator),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(number)
    ]


def loss_of(model, batch):
    ids, labels = batch
    return F.cross_entropy(model(ids), labels)


def columns_of(name, gradient):
    """The gradient of a weight as (rows, I), written down anew for each layer of Net."""
    if name == "down":
        return gradient.t()
    if name == "conv":  # (12, 4, 3), two groups: input channel 4 g + j meets outputs 6 g to 6 g + 5
        return torch.stack(
            [gradient[6 * (c // 4) : 6 * (c // 4) + 6, c % 4].flatten() for c in range(8)], 1
        )
    return gradient


def weights_of(model):
    return {name: model.get_submodule(name).weight for name in TARGETS}


def gradient_sums(model, batches, loss_fn=loss_of):
    """sum over batches of ||dW[:, i]||^2 of a plain backward pass each."""
    weights = weights_of(model)
    sums = dict.fromkeys(weights, 0.0)
    for batch in batches:
        gradients = torch.autograd.grad(loss_fn(model, batch), list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            sums[name] = sums[name] + columns_of(name, dense).square().sum(0)
    return sums
