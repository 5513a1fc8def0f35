"""Whole models that are loaded in four bits."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pacatune import PacaConfig
from pacatune.ops.columns import read_columns
from pacatune.tuner.quantized import dequantized
from tests.tuner.nets import layers


@pytest.fixture
def load(tiny_model_dir):
    def load(**options):
        config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **options}
        return AutoModelForCausalLM.from_pretrained(
            tiny_model_dir,
            dtype=torch.float32,
            quantization_config=BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **config),
        )

    return load


TARGETS = ["q_proj", "down_proj"]


IDS = torch.randint(0, 100, (2, 40), generator=torch.Generator().manual_seed(0))


class TestColumnsFromTheCheckpoint:
    @pytest.fixture
    def model(self, load):
        config = PacaConfig(r=4, paca_alpha=8, target_modules=TARGETS, columns_from="original")
        return get_peft_model(load(), config)

    def test_effective_columns_are_the_originals(self, model, tiny_model_dir):
        original = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        for name, layer in layers(model).items():
            weight = original.get_submodule(name).weight
            rounded = dequantized(layer.quantization_backend, layer.base_layer, torch.float32)
            columns = [read_columns(w, layer.paca_indices["default"]) for w in (rounded, weight)]
            assert not torch.allclose(*columns, atol=1e-4)
            own, originals = columns
            torch.testing.assert_close(own + 2.0 * layer.delta_of("default"), originals)

    def test_no_half_made_adapter_is_left(self, load, monkeypatch):
        def fail(*args, **options):
            raise IndexError("no such column")

        base = load()
        monkeypatch.setattr("pacatune.tuner.quantized.OriginalWeights.columns", fail)
        with pytest.raises(IndexError, match="no such column"):
            get_peft_model(base, PacaConfig(target_modules=TARGETS, columns_from="original"))
        assert not any(layer.r for layer in layers(base).values())

    def test_loads_on_the_same_rounding_only(self, model, load, tmp_path, tiny_model_dir):
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(load(), tmp_path, is_trainable=True)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        with pytest.raises(ValueError, match=r"'bitsandbytes nf4.*'bitsandbytes fp4.* wrong"):
            PeftModel.from_pretrained(load(bnb_4bit_quant_type="fp4"), tmp_path)
        plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        with pytest.raises(ValueError, match=r"this base is not quantised, where its update"):
            PeftModel.from_pretrained(plain, tmp_path)

    def test_a_base_that_is_not_quantised(self, tiny_model_dir):
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        none = {"paca_alpha": 0, "target_modules": TARGETS, "columns_from": "original"}
        with pytest.raises(
            ValueError, match=r"starts from an update, which `paca_alpha` \(0\) would"
        ):
            get_peft_model(base, PacaConfig(**none))
        with pytest.raises(ValueError, match=r"`columns_from` \('original'\) is for quantised"):
            get_peft_model(base, PacaConfig(target_modules=TARGETS, columns_from="original"))
        assert not any("paca" in name for name, _ in base.named_parameters())

    @pytest.mark.parametrize("name", ["", "/nowhere"])
    def test_no_checkpoint(self, load, name):
        base = load()
        base.name_or_path = name
        with pytest.raises(ValueError, match=f"no safetensors checkpoint at '{name}'"):
            get_peft_model(base, PacaConfig(target_modules=TARGETS, columns_from="original"))

    def test_another_checkpoint(self, load, tmp_path, tiny_model_dir):
        other = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        for parameter in other.parameters():
            nn.init.normal_(parameter, std=0.02)
        other.save_pretrained(tmp_path)
        base = load()
        base.name_or_path = str(tmp_path)
        before = base(IDS).logits.detach()
        with pytest.raises(ValueError, match=r"differs from the quantised weight by 1\d\d%"):
            get_peft_model(base, PacaConfig(target_modules=TARGETS, columns_from="original"))
        assert torch.equal(base(IDS).logits, before)
