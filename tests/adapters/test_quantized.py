"""Adapters trained on a quantised base: loading it alike, and merging onto three bases."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from pacatune.adapters.base import load_base, quantization_config
from pacatune.adapters.folder import read_adapter
from pacatune.adapters.generation import TextGenerator
from pacatune.adapters.inspect import inspect_adapter
from pacatune.adapters.loading import attach
from pacatune.adapters.merge import merge
from pacatune.tuner.quantized import QuantizedLinear, forbid_packing
from tests.adapters.fixtures import save_adapter

NF4 = {"method": "bitsandbytes", "type": "nf4", "block_size": 64, "double": True}
INT8 = {"method": "bitsandbytes", "type": "int8"}
TOKENS = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["dequantized", "original"])
def adapted(request, tmp_path_factory, tiny_model_dir):
    """A folder, and the model that was saved into it."""
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    # Enough columns that rounding them to four bits again is small beside what they change.
    model = save_adapter(
        tiny_model_dir,
        folder,
        quantization=NF4,
        columns_from=request.param,
        r=16,
        paca_alpha=32,
    )
    return folder, model


def logits(model):
    forbid_packing(model)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def effective(model, folder):
    """Map each adapted module to its columns' place and to W + scaling * delta there."""
    columns = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, QuantizedLinear):
            weight = module.get_base_weight() + module.get_delta_weight("default")
            columns[name] = module.paca_indices["default"], weight
    assert len(columns) == len(read_adapter(folder).modules)
    return columns


def test_dequantised_is_the_function_that_was_trained(adapted, tiny_model_dir, tmp_path):
    folder, model = adapted
    result = merge(str(tiny_model_dir), folder, tmp_path / "out")
    assert result.onto == "dequantized"
    assert result.error.max_relative < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not getattr(merged, "is_quantized", False)
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-4)
    for name, (_, weight) in effective(model, folder).items():
        torch.testing.assert_close(merged.get_submodule(name).weight, weight)


def test_original_keeps_what_was_not_trained(adapted, tiny_model_dir, tmp_path):
    folder, model = adapted
    result = merge(str(tiny_model_dir), folder, tmp_path / "out", onto="original")
    assert result.error.max_absolute <= result.limit < result.effect / 2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    trained = effective(model, folder)
    for name, module in original.named_modules():
        if isinstance(module, torch.nn.Linear):
            expected = module.weight.detach().clone()
            if name in trained:
                indices, weight = trained[name]
                expected[:, indices] = weight[:, indices]
            torch.testing.assert_close(merged.get_submodule(name).weight, expected)


def test_nf4_is_quantised_again_and_says_what_it_costs(adapted, tiny_model_dir, tmp_path):
    folder, model = adapted
    result = merge(str(tiny_model_dir), folder, tmp_path / "out", onto="nf4")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.is_loaded_in_4bit
    error = (logits(merged) - logits(model)).abs().max().item()
    assert error > 1e-3
    assert 1e-3 < result.error.max_absolute <= result.limit == result.effect / 2


def test_nf4_that_rounds_the_adapter_away_is_refused(tiny_model_dir, tmp_path):
    shrunk_adapter(tiny_model_dir, tmp_path / "adapter", 1e-2)
    message = "by rounding to nf4 again, more than half of what .* changes .* --base dequantized,"
    with pytest.raises(ValueError, match=message):
        merge(str(tiny_model_dir), tmp_path / "adapter", tmp_path / "out", onto="nf4")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    unmeasured = merge(
        str(tiny_model_dir), tmp_path / "adapter", tmp_path / "out", onto="nf4", verify=False
    )
    assert unmeasured.error is None


@pytest.mark.parametrize("kind", ["fp4", "int8"])
def test_nf4_is_not_another_rounding(kind, tiny_model_dir, tmp_path):
    quantization = {**NF4, "type": kind} if kind == "fp4" else INT8
    save_adapter(tiny_model_dir, tmp_path / "adapter", quantization=quantization)
    with pytest.raises(ValueError, match=rf"`onto` \('nf4'\): .* as 'bitsandbytes {kind}"):
        merge(str(tiny_model_dir), tmp_path / "adapter", tmp_path / "out", onto="nf4")


def test_int8_is_held_against_the_dequantised_layers(tiny_model_dir, tmp_path):
    """Its kernel rounds activations as well, which no merged model does."""
    shrunk_adapter(tiny_model_dir, tmp_path / "adapter", 1e-3, quantization=INT8)
    result = merge(str(tiny_model_dir), tmp_path / "adapter", tmp_path / "out")
    assert result.error.max_absolute <= result.limit
    assert any("round activations as well" in note for note in result.notes)


def test_a_difference_of_bases_is_not_called_rounding(tiny_model_dir, tmp_path):
    """What the original weights change is not undone by more bits."""
    shrunk_adapter(tiny_model_dir, tmp_path / "adapter", 1e-3)
    result = merge(
        str(tiny_model_dir), tmp_path / "adapter", tmp_path / "original", onto="original"
    )
    assert any("compare the losses" in note for note in result.notes)
    assert result.error.max_absolute <= result.limit


def shrunk_adapter(base, folder, factor, quantization=NF4):
    model = save_adapter(base, folder, quantization=quantization)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.delta_of("default").data.mul_(factor)
    model.save_pretrained(folder)


def test_generates_on_the_base_as_it_was_trained(adapted, tiny_model_dir):
    folder, model = adapted
    generator = TextGenerator(str(tiny_model_dir), folder, dtype="float32", device="cpu")
    assert torch.equal(logits(generator._model), logits(model))


def test_inspect_tells(adapted):
    folder, _ = adapted
    notes = " ".join(inspect_adapter(folder).notes)
    assert (
        "trained on a base quantised as bitsandbytes nf4, block_size 64, double; columns s" in notes
    )


def test_an_original_adapter_is_refused_on_a_plain_base(tiny_model_dir, tmp_path):
    save_adapter(tiny_model_dir, tmp_path, quantization=NF4, columns_from="original")
    base = load_base(str(tiny_model_dir), task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"this base is not quantised, where its update would be"):
        attach(base, read_adapter(tmp_path))


def test_other_bases_are_for_quantised_adapters(adapter_dir, tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"`onto` \('nf4'\) is for adapters of PaCA that were"):
        merge(str(tiny_model_dir), adapter_dir, tmp_path / "out", onto="nf4")


@pytest.mark.parametrize(
    "quantization",
    [
        {"method": "hqq", "bits": 4, "group_size": 64},
        {"method": "bitsandbytes", "type": "nf4", "block_size": 128},
        {"method": "bitsandbytes", "type": {"evil": 1}},
        {},
    ],
)
def test_what_cannot_be_repeated_is_said(quantization):
    with pytest.raises(ValueError, match=r"cannot be repeated while a model loads; load it with"):
        quantization_config(quantization, torch.float32)
