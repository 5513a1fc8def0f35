"""MosLoRA against plain autograd, and in everything that PEFT does with a LoRA adapter."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from pacatune import MosLoraConfig
from pacatune.tuner.moslora import MosLoraLayer
from tests.conftest import build_model
from tests.releases import needs
from tests.tuner.quantizers import QUANTIZERS, quantise

pytestmark = needs("peft", "0.19")

TARGETS = ["q_proj", "down_proj"]


def ids(seed=0):
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(seed))


def config_of(**options):
    return MosLoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **options})


def layers(model):
    return [module for module in model.modules() if isinstance(module, MosLoraLayer)]


def fill(model, adapter="default", seed=0):
    """Random values everywhere, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model):
        for part in (layer.lora_A, layer.lora_B, layer.lora_mixer):
            if adapter in part:
                part[adapter].weight.data.normal_(std=0.3, generator=generator)


def adapt(base=None, **options):
    model = get_peft_model(base or build_model(64), config_of(**options)).eval()
    fill(model)
    return model


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
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(y.square().sum(), [x, *weights])
        for y, weights in ((found, ours), (expected, theirs))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "base_layer" in n)


@pytest.mark.parametrize("mixer_init", ["kaiming", "orthogonal"])
def test_an_untrained_adapter_changes_nothing(mixer_init):
    base = build_model(64)
    before = base(ids()).logits
    model = get_peft_model(base, config_of(mixer_init=mixer_init))
    assert torch.equal(model(ids()).logits, before)
    for layer in layers(model):
        mixer = layer.lora_mixer["default"].weight
        assert layer.lora_B["default"].weight.abs().max() == 0
        if mixer_init == "orthogonal":
            torch.testing.assert_close(mixer @ mixer.t(), torch.eye(4), rtol=0, atol=1e-6)
        else:  # uniform in +- 1 / sqrt(r), as A is in +- 1 / sqrt(I)
            assert 0.2 < mixer.abs().max() <= 0.5
    # Zero is no fixed point: B has a gradient at once.
    model(ids()).logits.square().mean().backward()
    assert all(layer.lora_B["default"].weight.grad.abs().max() > 0 for layer in layers(model))


def test_dropout_is_before_a():
    model = adapt(lora_dropout=0.5).train()
    layer = layers(model)[0]
    x = torch.randn(4, layer.in_features)
    torch.manual_seed(0)
    found = layer(x)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    expected = layer.base_layer(x) + dropped @ layer.get_delta_weight("default").t()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def saved(tmp_path):
    """A base and its adapter, in folders, and what both compute."""
    base = build_model(64)
    base.save_pretrained(tmp_path / "base")
    model = adapt(base, rank_pattern={"down_proj": 2}, use_rslora=True)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, model(ids()).logits


def test_save_and_load(saved):
    folder, expected = saved
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert (config["peft_type"], config["mixer_init"]) == ("MOSLORA", "kaiming")
    options = {"low_cpu_mem_usage": True}
    loaded = PeftModel.from_pretrained(build_model(64), folder / "adapter", **options).eval()
    assert torch.equal(loaded(ids()).logits, expected)
    assert {len(layer.lora_mixer["default"].weight) for layer in layers(loaded)} == {2, 4}
    theirs = AutoModelForCausalLM.from_pretrained(folder / "adapter", dtype=torch.float32).eval()
    assert torch.equal(theirs(ids()).logits, expected)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge(safe_merge):
    model = adapt()
    expected = model(ids()).logits
    weights = [layer.base_layer.weight.clone() for layer in layers(model)]
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(model(ids()).logits, expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    for layer, weight in zip(layers(model), weights, strict=True):
        torch.testing.assert_close(layer.base_layer.weight, weight, rtol=1e-5, atol=1e-6)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(ids()).logits, expected, rtol=1e-5, atol=1e-5)
    layers(model)[0].lora_mixer["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)


@pytest.mark.filterwarnings("ignore:Merge lora module:UserWarning")
@pytest.mark.filterwarnings("ignore:Unmerge lora module:UserWarning")
@pytest.mark.parametrize("name", [n for n in sorted(QUANTIZERS) if n.startswith("bitsandbytes")])
def test_quantised_bases(name, tmp_path):
    def build():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        model[0], model[2] = quantise(model[0], name), quantise(model[2], name)
        return model

    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    model = get_peft_model(build(), config_of(target_modules=["0", "2"]))
    assert torch.equal(model(x), build()(x))
    fill(model)
    expected = model(x)
    by_hand = build()
    first, second = layers(model)
    hidden = torch.tanh(by_hand[0](x) + x @ first.get_delta_weight("default").t())
    y = by_hand[2](hidden) + hidden @ second.get_delta_weight("default").t()
    torch.testing.assert_close(expected, y, rtol=1e-4, atol=1e-4)
    expected.square().sum().backward()
    assert all(layer.lora_mixer["default"].weight.grad.abs().max() > 0 for layer in layers(model))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.eval()(x)  # the 8-bit kernel rounds otherwise than in training
        torch.testing.assert_close(PeftModel.from_pretrained(build(), tmp_path)(x), expected)
        model.merge_adapter(safe_merge=True)  # and every weight is rounded again
        assert (model(x) - expected).norm() < 0.2 * (expected - build()(x)).norm()


class Packed(torch.Tensor):
    """A weight that is not the matrix which it shows, like torchao's."""


@pytest.mark.parametrize(
    "weight", [torch.zeros(8, 8, dtype=torch.int8), torch.zeros(8, 8).as_subclass(Packed)]
)
def test_other_quantised_weights_are_refused(weight):
    linear = nn.Linear(8, 8)
    linear._parameters["weight"] = weight
    with pytest.raises(TypeError, match=r"'0' \(Linear\) is not supported. MosLoRA adapts"):
        get_peft_model(nn.Sequential(linear), config_of(target_modules=["0"]))


def test_several_adapters():
    base = build_model(64)
    plain = base(ids()).logits
    model = adapt(base)
    one = model(ids()).logits
    model.add_adapter("other", config_of(r=2, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("other")
    fill(model, "other", seed=1)
    other = model(ids()).logits
    with model.disable_adapter():
        assert torch.equal(model(ids()).logits, plain)
    rows = model(ids(), adapter_names=["default", "other"]).logits
    torch.testing.assert_close(rows[0], one[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows[1], other[1], rtol=1e-5, atol=1e-5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".other." in name for name in trained)
    assert any("lora_mixer.other" in name for name in trained)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert not [name for name, _ in model.named_parameters() if "other" in name]
    assert torch.equal(model(ids()).logits, one)


@pytest.mark.parametrize(
    "combination_type", ["cat", pytest.param("svd", marks=needs("peft", "0.21"))]
)
def test_weighted_sum(combination_type):
    model = adapt()
    model.add_adapter("other", config_of())
    fill(model, "other", seed=1)
    options = {"svd_rank": 8} if combination_type == "svd" else {}
    model.add_weighted_adapter(
        ["default", "other"], [0.7, 0.5], "sum", combination_type=combination_type, **options
    )
    for layer in layers(model):
        parts = [layer.get_delta_weight(name) for name in ("default", "other")]
        expected = 0.7 * parts[0] + 0.5 * parts[1]
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected, rtol=1e-4, atol=1e-5)


def test_sums_that_would_be_wrong():
    model = adapt()
    with pytest.raises(ValueError, match=r"`combination_type` \('linear'\) must be one of \('cat'"):
        model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="linear")
    with pytest.raises(ValueError, match=r"`adapter_name` \('default'\) is taken; delete it first"):
        model.add_weighted_adapter(["default"], [1.0], "default")
