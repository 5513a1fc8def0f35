"""PaCA in libraries that hold PEFT adapters themselves: sentence-transformers, diffusers, timm."""

import json

import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from pacatune import PacaConfig
from pacatune.adapters.export import export_lora
from pacatune.adapters.merge import merge
from tests.experiments.conftest import save_bert
from tests.releases import needs
from tests.tuner.nets import fill


class TestSentenceTransformers:
    WORDS = ("the", "a", "cat", "dog", "sun", "ice", "sat", "ran")
    TEXTS = ("the cat sat", "a dog ran")

    @pytest.fixture
    def folder(self, tmp_path):
        return save_bert(tmp_path / "bert", self.WORDS)

    @needs("sentence_transformers", "6")
    def test_trains_saves_loads_and_merges(self, folder, tmp_path, monkeypatch):
        from datasets import Dataset
        from sentence_transformers import (
            SentenceTransformer,
            SentenceTransformerTrainer,
            SentenceTransformerTrainingArguments,
        )
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        # transformers 5.24 asks for PEFT 0.22 before it adds one.
        monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", peft.__version__)

        def vectors(model):
            return model.encode(list(self.TEXTS), convert_to_tensor=True, device="cpu")

        model = SentenceTransformer(str(folder), device="cpu")
        before = vectors(model)
        model.add_adapter(PacaConfig(r=4, target_modules=["query", "value", "dense"]))
        rows = [{"anchor": f"the {word} sat", "positive": f"a {word} ran"} for word in self.WORDS]
        arguments = SentenceTransformerTrainingArguments(
            tmp_path / "run", max_steps=2, learning_rate=0.05, use_cpu=True, report_to=[]
        )
        SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            loss=MultipleNegativesRankingLoss(model),
        ).train()
        model.eval()
        trained = vectors(model)
        assert not torch.allclose(trained, before, atol=1e-3)
        model.save_pretrained(str(tmp_path / "trained"))
        loaded = SentenceTransformer(str(tmp_path / "trained"), device="cpu")
        assert torch.equal(vectors(loaded), trained)
        model.disable_adapters()
        assert torch.equal(vectors(model), before)

        merge(str(folder), tmp_path / "trained", tmp_path / "merged")
        merged = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
        torch.testing.assert_close(vectors(merged), trained, atol=1e-6, rtol=1e-5)


@needs("diffusers")
class TestDiffusers:
    TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

    def unet(self):
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 64),
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
        ).eval()

    def config(self):
        return PacaConfig(r=4, paca_alpha=8, target_modules=list(self.TARGETS))

    @torch.no_grad()
    def noise(self, unet):
        generator = torch.Generator().manual_seed(0)
        image, text = (torch.randn(*n, generator=generator) for n in ((2, 4, 8, 8), (2, 6, 32)))
        return unet(image, torch.tensor([3, 5]), text).sample

    def test_add_adapter(self):
        unet = self.unet()
        before = self.noise(unet)
        unet.add_adapter(self.config())
        fill(unet)
        after = self.noise(unet)
        assert not torch.allclose(after, before, atol=1e-3)
        unet.disable_adapters()
        assert torch.equal(self.noise(unet), before)
        unet.enable_adapters()
        assert torch.equal(self.noise(unet), after)

    @pytest.mark.parametrize("is_given_adapted", [False, True])
    def test_exported_adapters_are_lora_of_diffusers(self, tmp_path, is_given_adapted):
        model = get_peft_model(self.unet(), self.config())
        fill(model)
        after = self.noise(model)
        model.save_pretrained(tmp_path / "paca")
        base = model.get_base_model() if is_given_adapted else self.unet()
        result = export_lora(base, tmp_path / "paca", tmp_path / "lora")
        assert (result.base, result.num_modules) == ("", 32)
        config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] is None

        lora = self.unet()
        tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
        lora.load_lora_adapter(tensors, prefix="base_model.model", metadata=None)
        assert not torch.allclose(self.noise(lora), after, atol=1e-3), "alpha / r is not in there"

        lora = self.unet()
        plain = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
        lora.load_lora_adapter(plain, prefix=None, metadata=config, adapter_name="default")
        torch.testing.assert_close(self.noise(lora), after, atol=1e-6, rtol=1e-5)
        lora.save_lora_adapter(tmp_path / "diffusers")
        again = self.unet()
        again.load_lora_adapter(
            tmp_path / "diffusers", prefix=None, weight_name="pytorch_lora_weights.safetensors"
        )
        assert torch.equal(self.noise(again), self.noise(lora))
