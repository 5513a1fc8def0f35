"""Adapters trained on a quantised base: loading it alike, and merging onto three bases."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from pacatune.adapters.base import quantization_config
from pacatune.adapters.folder import read_adapter
from pacatune.adapters.inspect import inspect_adapter
from pacatune.adapters.loading import load_language_model
from pacatune.adapters.merge import merge
from pacatune.tuner.quantized import QuantizedLinear, forbid_packing
from tests.adapters.fixtures import logits_of, save_adapter, scale

NF4 = {"method": "bitsandbytes", "type": "nf4", "block_size": 64, "double": True}
FP4, INT8 = {**NF4, "type": "fp4"}, {"method": "bitsandbytes", "type": "int8"}


@pytest.fixture(scope="module", params=["dequantized", "original"])
def adapted(request, tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    # Enough columns that rounding them to four bits again is small beside what they change.
    options = {"columns_from": request.param, "r": 16, "paca_alpha": 32}
    return folder, save_adapter(tiny_model_dir, folder, quantization=NF4, **options)


def logits(model):
    forbid_packing(model)
    return logits_of(model)


def effective(model, folder):
    """Map each adapted module to its columns' place and to W + scaling * delta there."""
    columns = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, QuantizedLinear):
            weight = module.get_base_weight() + module.get_delta_weight("default")
            columns[name] = module.paca_indices["default"], weight
    assert len(columns) == len(read_adapter(folder).modules)
    return columns


@pytest.fixture
def merged(adapted, tmp_path):
    """Merge onto one of the bases; return what the merge says, and the model."""

    def run(onto=None):
        result = merge(None, adapted[0], tmp_path / "out", onto=onto)
        return result, AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    return run


def test_dequantised_is_the_function_that_was_trained(adapted, merged):
    folder, model = adapted
    result, found = merged()
    assert result.onto == "dequantized"
    assert result.rounding < 1e-5
    assert not getattr(found, "is_quantized", False)
    torch.testing.assert_close(logits(found), logits(model), atol=1e-5, rtol=1e-4)
    for name, (_, weight) in effective(model, folder).items():
        torch.testing.assert_close(found.get_submodule(name).weight, weight)


def test_original_keeps_what_was_not_trained(adapted, merged, tiny_model_dir):
    folder, model = adapted
    _, found = merged("original")
    original = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    trained = effective(model, folder)
    for name, module in original.named_modules():
        if isinstance(module, torch.nn.Linear):
            expected = module.weight.detach().clone()
            if name in trained:
                indices, weight = trained[name]
                expected[:, indices] = weight[:, indices]
            torch.testing.assert_close(found.get_submodule(name).weight, expected)


def test_nf4_is_quantised_again_and_says_what_it_costs(adapted, merged):
    result, found = merged("nf4")
    assert found.is_loaded_in_4bit
    assert (logits(found) - logits(adapted[1])).abs().max() > 1e-3
    assert 0.01 < result.rounding < 0.5
    assert not any("rounding to" in note for note in result.notes)


def test_it_is_described_and_runs_on_the_base_as_it_was_trained(adapted):
    folder, model = adapted
    loaded = load_language_model(None, folder, dtype="float32")
    assert torch.equal(logits(loaded.model), logits(model))
    described = inspect_adapter(folder).base_quantization
    assert described == "bitsandbytes nf4, block_size 64, double"


@pytest.fixture
def small(tiny_model_dir, tmp_path):
    """Save an adapter that changes little; return its folder."""

    def save(factor, quantization=NF4):
        save_adapter(tiny_model_dir, tmp_path / "adapter", quantization=quantization)
        scale(tmp_path / "adapter", factor)
        return tmp_path / "adapter"

    return save


def test_nf4_that_rounds_the_adapter_away_is_noted(small, tmp_path):
    result = merge(None, small(1e-2), tmp_path / "out", onto="nf4")
    note = f"rounding to nf4 takes {result.rounding:.0%} of what the adapter changes; --base deq"
    assert any(note in one for one in result.notes)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (FP4, r"`onto` \('nf4'\): .* as 'bitsandbytes fp4"),
        (INT8, r"`onto` \('nf4'\): .* as 'bitsandbytes int8"),
        (None, r"`onto` \('nf4'\) is for adapters of PaCA that were"),
    ],
)
def test_nf4_is_for_adapters_of_nf4(small, tmp_path, quantization, message):
    with pytest.raises(ValueError, match=message):
        merge(None, small(1, quantization), tmp_path / "out", onto="nf4")


def test_what_cannot_be_repeated_is_said():
    hqq = {"method": "hqq", "bits": 4, "group_size": 64}
    for one in (hqq, {**NF4, "block_size": 128}, {**NF4, "type": {"evil": 1}}, {}):
        with pytest.raises(ValueError, match=r"cannot be repeated while a model loads; load it"):
            quantization_config(one, torch.float32)
