"""Adapters put onto their base: what runs is what the file holds, or it is refused."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pacatune import pretrained
from pacatune.adapters.folder import open_adapter, read_adapter
from pacatune.adapters.loading import attach, load_language_model
from pacatune.tuner.quantized import forbid_packing
from tests.adapters.fixtures import edit_json, edit_tensors, logits_of, save_adapter
from tests.releases import needs

CONFIG = "adapter_config.json"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["q_proj", "v_proj", "down_proj", "k_proj"],
            r"k_proj' is adapted by its configuration only \(2",
        ),
        (["q_proj", "v_proj"], "down_proj.paca_.*but this model has no such adapted"),
    ],
)
def test_file_and_configuration_adapt_the_same_modules(adapter_copy, model, targets, message):
    edit_json(adapter_copy / CONFIG, target_modules=targets)
    with pytest.raises(ValueError, match=message):
        attach(model, read_adapter(adapter_copy))


def test_values_that_do_not_arrive_are_noticed(adapter_copy, model):
    adapter = read_adapter(adapter_copy)
    path = adapter_copy / "adapter_model.safetensors"
    changed = {n: t + 1 if "delta" in n else t for n, t in load_file(path).items()}
    save_file(changed, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)  # the old file stays mapped
    with pytest.raises(ValueError, match="does not hold the file's values after loading"):
        attach(model, adapter)


def test_a_lora_adapter_with_missing_tensors_is_refused(lora_dir, tmp_path, model):
    folder = shutil.copytree(lora_dir, tmp_path / "lora")
    edit_tensors(folder, lambda tensors: [tensors.pop(n) for n in [*tensors] if "v_proj" in n])
    with pytest.raises(ValueError, match=r"PEFT cannot load the adapter .*missing adapter keys"):
        attach(model, open_adapter(folder))


# Language models, perhaps on a quantised base.

NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}


@needs("bitsandbytes")
@pytest.mark.parametrize(("kind", "options"), [("nf4", NF4), ("int8", {"load_in_8bit": True})])
def test_quantised_base_with_a_lora_adapter(tiny_model_dir, lora_dir, kind, options):
    """The outputs are those of PEFT on a model that transformers quantised."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = {"quantization_config": BitsAndBytesConfig(**options), "device_map": {"": "cpu"}}
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype="auto", **config)
    forbid_packing(base)
    loaded = load_language_model(None, lora_dir, quantization=kind)
    expected = logits_of(PeftModel.from_pretrained(base, lora_dir))
    assert torch.equal(logits_of(loaded.model), expected)
    plain = load_language_model(None, lora_dir)
    assert not torch.allclose(logits_of(plain.model), expected, atol=1e-4)


@needs("bitsandbytes")
def test_paca_adapter_knows_its_quantised_base(tiny_model_dir, tmp_path):
    nf4 = {"method": "bitsandbytes", "type": "nf4", "block_size": 64, "double": True}
    save_adapter(tiny_model_dir, tmp_path, quantization=nf4)
    known, asked = (
        load_language_model(None, tmp_path, quantization=kind).model for kind in (None, "nf4")
    )
    assert torch.equal(logits_of(known), logits_of(asked))
    with pytest.raises(ValueError, match=r"`quantization` \('int8'\) is not the one .* \('nf4'\)"):
        load_language_model(None, tmp_path, quantization="int8")
    quantised = load_language_model(str(tiny_model_dir), quantization="nf4")
    quantised.model.save_pretrained(tmp_path / "base")
    quantised.tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"`quantization` \('nf4'\): .* is saved quantised"):
        load_language_model(str(tmp_path / "base"), quantization="nf4")


def test_what_cannot_be_loaded(tiny_model_dir, monkeypatch):
    with pytest.raises(ValueError, match="`model` and `adapter` are both missing"):
        load_language_model(None)
    with pytest.raises(ValueError, match=r"`quantization` \('nf5'\) must be one of nf4, fp4, int8"):
        load_language_model(str(tiny_model_dir), quantization="nf5")
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes; pip install 'pacatune\[quant\]'"):
        load_language_model(str(tiny_model_dir), quantization="nf4")
