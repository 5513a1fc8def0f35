"""A tiny adapted Llama, and what a server of its base holds."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from pacatune import PacaConfig
from pacatune.ops.columns import bits
from pacatune.sync import ColumnReceiver, ColumnSource
from tests.conftest import build_model
from tests.distributed import net
from tests.distributed.conftest import pair
from tests.tuner.quantizers import quantise

__all__ = ["pair"]

VOCABULARY = 64


def adapt(dtype=torch.float32, base=None, **options):
    options = {"r": 4, "paca_alpha": 8, "target_modules": "all-linear", **options}
    return get_peft_model(served(dtype) if base is None else base, PacaConfig(**options))


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).bfloat16()


def in_few_bits(name, **options):
    base = two_layers()
    base[0], base[2] = quantise(base[0], name), quantise(base[2], name)
    return adapt(base=base, target_modules=["0", "2"], **options)


def served(dtype=torch.float32):
    """The plain base in the dtype that is served."""
    return build_model(VOCABULARY).to(dtype)


def step(model, optimizer=None, seed=0):
    optimizer = optimizer or torch.optim.AdamW(net.trained(model), lr=1e-2)
    ids = torch.randint(3, VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(seed))
    net.step(model, optimizer, ids)
    return model


def change(model, number=0, by=1):
    with torch.no_grad():
        net.layers_of(model)[number].delta_of("default").add_(by)


def nudge(model, seed, by=1e-5):
    """Change every delta by less than most elements' rounding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.trained(model):
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))


def bring(source, receiver):
    """Bring the columns over, without a transport."""
    receiver.apply(source.columns())


def merged(model, dtype=None):
    """Tensors of the model that a merge writes, in the dtype that is served."""
    base = copy.deepcopy(model).merge_and_unload()
    return {name: tensor.to(dtype or tensor.dtype) for name, tensor in base.state_dict().items()}


def assert_bits(model, expected):
    found = model if isinstance(model, dict) else model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(bits(tensor), bits(expected[name])), name


def clone(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def model():
    return adapt()


@pytest.fixture
def server():
    return served()


@pytest.fixture
def source(model):
    return ColumnSource(model)


@pytest.fixture
def receiver(server):
    return ColumnReceiver(server)


@pytest.fixture
def sync(model, server, source, receiver):
    """Brings the columns over; the server then has the bits of a merge."""

    def check():
        receiver.apply(source.columns())
        assert_bits(server, merged(model))

    return check
