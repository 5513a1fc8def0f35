"""Which modules are found, and which are left alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pacatune import lean
from tests.lean.models import build
from tests.releases import needs


def test_replaced_forwards_are_left_alone(batch):
    model = build("Llama")
    mlp, norm = model.model.layers[0].mlp, model.model.norm
    for module in (mlp, norm, model):
        module.forward = module.forward
    report = lean.enable(model)
    assert "model.layers.0.mlp" not in report.made["gated_mlp"]
    assert "loss" not in report.made
    assert any("its forward was replaced" in reason for reason in report.left)
    assert any("replaced the model's forward" in reason for reason in report.left)
    assert "forward" in vars(mlp)


class Almost(nn.Module):
    """A gated MLP that does a little more."""

    def __init__(self, twist):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)
        self.c, self.act = nn.Linear(6, 4), nn.SiLU()
        self.twist = twist

    def forward(self, x):
        gate, up = self.a(x), self.b(x)
        if self.twist == "swapped":
            gate, up = up, gate
        h = self.act(gate) * up
        if self.twist == "scaled":
            h = h * 1.001
        if self.twist == "clipped":
            h = h.clamp(-50, 50)
        return self.c(h)


class SomeNorm(nn.Module):
    def __init__(self, twist):
        super().__init__()
        self.weight, self.eps, self.twist = nn.Parameter(torch.ones(8)), 1e-6, twist

    def forward(self, x):
        wide = x.float()
        mean = wide.square().mean(-1, keepdim=True)
        eps = 1e-4 if self.twist == "other eps" else self.eps
        n = (wide * torch.rsqrt(mean + eps)).to(x.dtype)
        return self.weight * (n * 2 if self.twist == "doubled" else n)


@pytest.mark.parametrize("twist", [None, "swapped", "scaled", "clipped"])
def test_any_gated_mlp_is_found_and_what_does_a_little_more_is_not(twist):
    module, x = nn.Sequential(Almost(twist)), torch.randn(3, 4)
    expected, report = module(x), lean.enable(module)
    if twist in (None, "swapped"):
        assert report.made == {"gated_mlp": ["0"]}
    else:
        reason = "Almost is not down(act(gate(x)) * up(x)) with a known activation"
        assert (report.made, report.left) == ({}, {reason: ["0"]})
    torch.testing.assert_close(module(x), expected)


def test_convolutions_under_adapters_are_no_gated_mlp():
    # PEFT's layers around convolutions have in_features and out_features; by them, an inverted
    # residual that widens 6 channels to 24 could be one layer for gate and up.
    block = nn.Sequential(nn.Conv2d(6, 24, 1), nn.ReLU(), nn.Conv2d(12, 6, 1))
    model = nn.ModuleDict({"block": block})
    config = LoraConfig(r=2, target_modules=["block.0", "block.2"])
    report = lean.enable(get_peft_model(model, config))
    assert not report.left


def test_any_norm_is_found_and_no_other():
    modules = nn.ModuleDict(
        {"a": SomeNorm(None), "b": SomeNorm("other eps"), "c": SomeNorm("doubled")}
    )
    report = lean.enable(modules)
    assert report.made == {"norm": ["a"]}
    assert report.left == {"SomeNorm is no RMSNorm or LayerNorm we know": ["b", "c"]}


@needs("torch", "2.7")  # 2.6 rounds eps in bfloat16
def test_torchs_rms_norm_is_found():
    model = nn.Sequential(nn.RMSNorm(8, eps=1e-6)).bfloat16()
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    expected = model(x)
    report = lean.enable(model, mode="require")
    assert report.made == {"norm": ["0"]}
    assert torch.equal(model(x), expected)
