"""Convolutions that cannot be adapted, or only in part."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM

from pacatune import PacaConfig
from tests.releases import needs
from tests.tuner.conv_nets import CNN_TARGETS, Cnn, Standardises, adapt, layers

# Dynamo itself instantiates autograd Functions while it traces them.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


class TestRefused:
    def test_rank_above_the_input_channels(self):
        base = Cnn()
        with pytest.raises(
            ValueError, match=r"`r` \(4\) must be in \[1, in_features=3\] for 'stem'"
        ):
            get_peft_model(base, PacaConfig(r=4, target_modules=CNN_TARGETS))
        assert not layers(base)

    def test_transposed_convolutions(self):
        with pytest.raises(TypeError, match=r"ConvTranspose2d\) is not supported.*torch.nn.Conv1d"):
            adapt(nn.Sequential(nn.ConvTranspose2d(3, 4, 3)))

    def test_columns_beyond_the_input_channels(self, tmp_path):
        adapt(Cnn(), ["grouped"]).save_pretrained(tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        tensors = load_file(path)
        tensors["base_model.model.grouped.paca_indices"] = torch.tensor([0, 8])
        save_file(tensors, path)
        with pytest.raises(ValueError, match=r"names column 8.*in_features=8"):
            PeftModel.from_pretrained(Cnn(), tmp_path)

    def test_another_kernel_size(self, tmp_path):
        adapt(nn.Sequential(nn.Conv2d(3, 4, 5))).save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match=r"size mismatch.*\[4, 2, 5, 5\]"):
            PeftModel.from_pretrained(nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path)

    @needs("peft", "0.19")
    def test_pefts_conversion_to_lora(self):
        from peft import convert_to_lora

        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            convert_to_lora(adapt(Cnn(), CNN_TARGETS), rank=2)

    @pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
    def test_weights_that_hooks_make(self):
        base = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)))
        with pytest.raises(ValueError, match=r"'0' has a parametrised weight"):
            adapt(base)
        assert not layers(base)

    def test_offloaded_layers_with_a_forward_of_their_own(self):
        layer = layers(adapt(nn.Sequential(Standardises(3, 4, 3))))[0]
        layer.base_layer.to("meta")
        assert layer.weight.is_meta
        with pytest.raises(ValueError, match="weight of a Standardises is offloaded or sharded"):
            layer(torch.randn(1, 3, 5, 5))


class TestMixersThatReadTheWeight:
    """Mamba's cached steps and its fused kernels never call their convolution."""

    @pytest.fixture
    def model(self):
        config = MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2)
        return adapt(MambaForCausalLM(config).eval(), ["conv1d"], r=8)

    def test_generation_is_that_of_the_merged_model(self, model):
        ids = torch.arange(3, 9)[None]
        options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
        ours = model.generate(input_ids=ids, return_dict_in_generate=True, **options)
        with model.disable_adapter():
            base = model.generate(input_ids=ids, return_dict_in_generate=True, **options)
        merged = model.merge_and_unload()
        theirs = merged.generate(ids, return_dict_in_generate=True, **options)
        torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits))
        assert not torch.allclose(torch.stack(base.logits), torch.stack(theirs.logits))

    def test_the_weight_that_is_read_trains_the_adapter(self, model):
        layer = layers(model)[0]
        x = torch.randn(2, 32, 6)
        y = F.conv1d(x, layer.weight, layer.bias, padding=3, groups=32)
        ours = torch.autograd.grad(y.square().sum(), layer.delta_of("default"))
        theirs = torch.autograd.grad(layer(x).square().sum(), layer.delta_of("default"))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)

    def test_disabled_and_merged_layers_show_their_base(self, model):
        layer = layers(model)[0]
        with model.disable_adapter():
            assert layer.weight is layer.base_layer.weight
        model.merge_adapter()
        assert layer.weight is layer.base_layer.weight
