import importlib.util

import pytest
import torch

from pacatune import pretrained
from pacatune.adapters.loading import load_language_model
from pacatune.tuner.quantized import forbid_packing
from tests.adapters.fixtures import save_adapter

bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def logits(loaded):
    with torch.no_grad():
        return loaded.model(torch.arange(3, 40)[None]).logits


@bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_base_with_a_lora_adapter(tiny_model_dir, lora_dir, kind):
    """The outputs are those of PEFT on a model that transformers quantised."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {"load_in_8bit": True}
    if kind == "nf4":
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.float32,
        }
    base = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir,
        quantization_config=BitsAndBytesConfig(**options),
        device_map={"": "cpu"},
        dtype="auto",
    )
    forbid_packing(base)
    expected = PeftModel.from_pretrained(base, lora_dir).eval()
    loaded = load_language_model(str(tiny_model_dir), lora_dir, quantization=kind)
    plain = load_language_model(str(tiny_model_dir), lora_dir)
    with torch.no_grad():
        assert torch.equal(logits(loaded), expected(torch.arange(3, 40)[None]).logits)
    assert not torch.allclose(logits(loaded), logits(plain), atol=1e-4)


@bitsandbytes
def test_paca_adapter_knows_its_quantised_base(tiny_model_dir, tmp_path):
    nf4 = {"method": "bitsandbytes", "type": "nf4", "block_size": 64, "double": True}
    save_adapter(tiny_model_dir, tmp_path, quantization=nf4)
    known = load_language_model(str(tiny_model_dir), tmp_path)
    asked = load_language_model(str(tiny_model_dir), tmp_path, quantization="nf4")
    assert torch.equal(logits(known), logits(asked))
    with pytest.raises(ValueError, match=r"`quantization` \('int8'\) is not the one .* \('nf4'\)"):
        load_language_model(str(tiny_model_dir), tmp_path, quantization="int8")


def test_unknown_quantization(tiny_model_dir):
    with pytest.raises(ValueError, match=r"`quantization` \('nf5'\) must be one of nf4, fp4, int8"):
        load_language_model(str(tiny_model_dir), quantization="nf5")


@bitsandbytes
def test_base_that_is_saved_quantised(tiny_model_dir, tmp_path):
    quantised = load_language_model(str(tiny_model_dir), quantization="nf4")
    quantised.model.save_pretrained(tmp_path)
    quantised.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`quantization` \('nf4'\): .* is saved quantised"):
        load_language_model(str(tmp_path), quantization="nf4")


def test_bitsandbytes_is_missing(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes; pip install 'pacatune\[quant\]'"):
        load_language_model(str(tiny_model_dir), quantization="nf4")


def test_nothing_to_load():
    with pytest.raises(ValueError, match="`model` and `adapter` are both missing"):
        load_language_model(None)
