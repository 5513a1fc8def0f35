"""Several MosLoRA adapters, their sums, and what becomes of them."""

import pytest
import torch

from tests.conftest import build_model
from tests.releases import needs
from tests.tuner.test_moslora import adapt, config_of, ids, layers

pytestmark = needs("peft", "0.19")


def test_several_adapters():
    base = build_model(64)
    plain = base(ids()).logits
    model = adapt(base)
    one = model(ids()).logits
    model.add_adapter("other", config_of(r=2, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("other")
    fill_where(model, "other")
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


def fill_where(model, adapter, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model):
        for part in (layer.lora_A, layer.lora_B, layer.lora_mixer):
            if adapter in part:
                part[adapter].weight.data.normal_(std=0.3, generator=generator)


@pytest.mark.parametrize(
    "combination_type", ["cat", pytest.param("svd", marks=needs("peft", "0.21"))]
)
def test_weighted_sum(combination_type):
    model = adapt()
    model.add_adapter("other", config_of())
    fill_where(model, "other")
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


def test_conversion_to_lora():
    from peft import convert_to_lora

    model = adapt()
    expected = [layer.get_delta_weight("default") for layer in layers(model)]
    _, factors = convert_to_lora(model, rank=4, progressbar=False)
    names = sorted(name for name in factors if "lora_A" in name)
    assert len(names) == len(expected)
    deltas = {n: factors[n.replace("lora_A", "lora_B")] @ factors[n] for n in names}
    for delta in expected:
        assert any(
            found.shape == delta.shape and torch.allclose(found, delta, atol=1e-4)
            for found in deltas.values()
        )
