"""MosLoRA against plain autograd, and as a method that is added to those of `train`."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from experiments.moslora import Linear, MosLoraConfig
from pacatune.methods import CLASSIFIER_METHODS, METHODS, TEXT_METHODS, adapter_config
from pacatune.training import RunConfig
from tests.conftest import build_model

TARGETS = ["q_proj", "down_proj"]


def ids(seed=0):
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(seed))


def config_of(**options):
    return MosLoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **options})


def layers(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


def fill(model):
    """Random values everywhere, so that nothing is zero."""
    generator = torch.Generator().manual_seed(0)
    for layer in layers(model):
        for part in (layer.lora_A, layer.lora_B, layer.lora_mixer):
            part["default"].weight.data.normal_(std=0.3, generator=generator)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 10)
        self.conv1d = Conv1D(7, 10)

    def forward(self, x):
        return self.conv1d(torch.tanh(self.linear(x)))


def reference(net, x, factors, scaling):
    """W + s B M A in plain autograd; Conv1D keeps its weight transposed."""
    (a1, m1, b1), (a2, m2, b2) = factors
    w1 = net.linear.weight + scaling * b1 @ m1 @ a1
    w2 = net.conv1d.weight.t() + scaling * b2 @ m2 @ a2
    return F.linear(torch.tanh(F.linear(x, w1, net.linear.bias)), w2, net.conv1d.bias)


def test_equals_plain_autograd():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().double()
        x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    config = config_of(target_modules=["linear", "conv1d"])
    model = get_peft_model(copy.deepcopy(net), config, autocast_adapter_dtype=False)
    fill(model)
    parts = [(layer.lora_A, layer.lora_mixer, layer.lora_B) for layer in layers(model)]
    ours = [part["default"].weight for one in parts for part in one]
    theirs = [weight.detach().clone().requires_grad_() for weight in ours]
    expected = reference(net, x, [theirs[:3], theirs[3:]], 6 / 4)
    y = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(y.square().sum(), [x, *weights])
        for y, weights in ((y, ours), (expected, theirs))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_an_untrained_adapter_changes_nothing_and_a_saved_one_comes_back(tmp_path):
    base = build_model(64)
    before = base(ids()).logits
    model = get_peft_model(base, config_of(use_rslora=True))
    assert torch.equal(model(ids()).logits, before)
    fill(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MOSLORA"
    loaded = PeftModel.from_pretrained(build_model(64), tmp_path).eval()
    assert torch.equal(loaded(ids()).logits, model.eval()(ids()).logits)


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 4, 1), nn.Embedding(4, 4)])
def test_other_layers_are_refused(layer):
    with pytest.raises(TypeError, match=r"'0' \(\w+\) is not supported. MosLoRA adapts torch"):
        get_peft_model(nn.Sequential(layer), config_of(target_modules=["0"]))


def test_it_is_a_row_of_methods():
    assert "moslora" in TEXT_METHODS
    assert "moslora" in CLASSIFIER_METHODS
    sections = {"model": {"path": "m"}, "data": {"path": "d"}, "lora": {"lora_dropout": 0.1}}
    run = RunConfig(method="moslora", **sections)
    assert run.method == "moslora"
    assert isinstance(adapter_config(METHODS["moslora"], r=4, lora_dropout=0.1), MosLoraConfig)
