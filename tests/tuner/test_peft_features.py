"""What PEFT users do, beyond PEFT's own tests (tests/conformance runs those)."""

import copy
import json

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from pacatune import PacaConfig
from pacatune.selection import seed_for
from tests.releases import LOADS_ADAPTERS, needs
from tests.tuner.small_llama import TARGETS, adapt, logits, paca_layers, randomise


@pytest.fixture(autouse=True)
def _peft_is_new_enough(monkeypatch):
    """Let transformers 5.24 add adapters with this PEFT: it asks for 0.22, and for nothing else."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", peft.__version__)


class TestFiles:
    def test_names_shapes_and_dtypes_are_those_of_peft_0_22(self, base, tmp_path):
        model = adapt(base, random_seed=5)
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        assert len(tensors) == 2 * len(paca_layers(model))
        name = "base_model.model.model.layers.0.self_attn.q_proj"
        delta, indices = tensors[f"{name}.paca_delta"], tensors[f"{name}.paca_indices"]
        assert delta.shape == (32, 4)
        assert delta.dtype == torch.float32
        assert indices.shape == (4,)
        assert indices.dtype == torch.int64
        generator = torch.Generator().manual_seed(seed_for(5, "model.layers.0.self_attn.q_proj"))
        assert torch.equal(indices, torch.randperm(32, generator=generator)[:4].sort().values)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["peft_type"] == "PACA"
        assert {"r", "paca_alpha", "random_seed", "init_weights", "layers_pattern"} <= set(config)

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_columns_come_from_the_file_and_not_from_the_seed(
        self, base, ids, tmp_path, low_cpu_mem_usage
    ):
        model = adapt(base)
        want = logits(model, ids)
        model.save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "random_seed": 999}))
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded, ids), want)

    @pytest.mark.skipif(not LOADS_ADAPTERS, reason="transformers 5 needs PEFT >= 0.19 to load them")
    def test_loads_by_every_door(self, base, ids, tmp_path, tiny_model_dir):
        model = adapt(base)
        want = logits(model, ids)
        model.save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        config = {**json.loads(path.read_text()), "base_model_name_or_path": str(tiny_model_dir)}
        path.write_text(json.dumps(config))
        assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path), ids), want)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), want)
        plain = copy.deepcopy(base)
        plain.load_adapter(str(tmp_path))
        assert torch.equal(logits(plain, ids), want)
        two = adapt(base, seed=1)
        two.load_adapter(tmp_path, adapter_name="loaded")
        two.set_adapter("loaded")
        assert torch.equal(logits(two, ids), want)

    @pytest.mark.skipif(not LOADS_ADAPTERS, reason="transformers 5 needs PEFT >= 0.19 to load them")
    @pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
    @pytest.mark.parametrize("groups", [1, 2])  # in files: type PACA, and PACATUNE
    def test_adapters_of_transformers(self, base, ids, tmp_path, tiny_model_dir, groups):
        plain = logits(base, ids)
        base.add_adapter(PacaConfig(r=4, target_modules=TARGETS, groups=groups))
        randomise(base)
        first = logits(base, ids)
        base.add_adapter(PacaConfig(r=2, target_modules=["up_proj"], groups=groups), "other")
        randomise(base, 1, "other")
        assert base.active_adapters() == ["other"]
        assert len(base.get_adapter_state_dict()) == 2 * 2
        assert not torch.equal(logits(base, ids), first)
        base.set_adapter("default")
        assert torch.equal(logits(base, ids), first)
        base.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert torch.equal(logits(loaded, ids), first)
        base.disable_adapters()
        assert torch.equal(logits(base, ids), plain)
        base.enable_adapters()
        base.delete_adapter("other")
        assert torch.equal(logits(base, ids), first)
        base.delete_adapter("default")
        assert torch.equal(logits(base, ids), plain)

    def test_hotswap_of_peft_is_for_lora_and_says_so(self, base, ids, tmp_path):
        from peft.utils.hotswap import hotswap_adapter

        adapt(base, seed=1).save_pretrained(tmp_path)
        model = adapt(base)
        before = logits(model, ids)
        with pytest.raises(ValueError, match="only supports LORA but PACA"):
            hotswap_adapter(model, str(tmp_path), "default")
        assert torch.equal(logits(model, ids), before)

    def test_reference_adapter_of_trl_is_a_copy(self, base, ids):
        """TRL copies the parameters whose names contain `.default.`, nothing else."""
        model = adapt(base)
        model.add_adapter("ref", model.peft_config["default"])
        for name, parameter in model.named_parameters():
            if ".default." in name:
                model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
        want = logits(model, ids)
        model.set_adapter("ref")
        assert torch.equal(logits(model, ids), want)


class TestDamagedFiles:
    def load(self, base, tmp_path, change):
        adapt(base).save_pretrained(tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        return PeftModel.from_pretrained(base, tmp_path)

    NAME = "base_model.model.model.layers.0.self_attn.q_proj"

    @pytest.mark.parametrize(
        ("kind", "value", "message"),
        [
            ("indices", torch.tensor([0, 1, 2, 32]), r"names column 32.*in_features=32"),
            ("indices", torch.tensor([1, 0, 2, 3]), "increasing|sorted"),
            ("indices", torch.tensor([0, 1, 1, 3]), "twice|duplicate|unique"),
            ("indices", torch.tensor([-1, 1, 2, 3]), "negative|-1"),
            ("indices", torch.tensor([0, 1, 2, 3], dtype=torch.int32), "int64"),
            ("delta", torch.full((32, 4), float("nan")), "finite|NaN"),
            ("delta", torch.zeros(32, 4, dtype=torch.int64), "int64|floating"),
        ],
    )
    def test_wrong_values(self, base, tmp_path, kind, value, message):
        def change(tensors):
            tensors[f"{self.NAME}.paca_{kind}"] = value

        with pytest.raises(ValueError, match=message):
            self.load(base, tmp_path, change)

    def test_half_a_module(self, base, tmp_path):
        with pytest.raises(ValueError, match="has `paca_delta` but no `paca_indices`"):
            self.load(base, tmp_path, lambda t: t.pop(f"{self.NAME}.paca_indices"))

    def test_another_base(self, base, tmp_path):
        def change(tensors):
            for kind in ("delta", "indices"):
                value = tensors.pop(f"{self.NAME}.paca_{kind}")
                tensors[f"{self.NAME.replace('q_proj', 'query')}.paca_{kind}"] = value

        with pytest.raises(ValueError, match=r"query.paca_.*no such adapted module"):
            self.load(base, tmp_path, change)


class TestTargets:
    def test_a_name_that_matches_nothing_is_an_error_and_nothing_changes(self, base):
        with pytest.raises(ValueError, match=r"\['query'\] match no module.*q_proj \(2\)"):
            get_peft_model(base, PacaConfig(target_modules=["q_proj", "query"]))
        assert not paca_layers(base)

    def test_no_name_matches(self, base):
        with pytest.raises(ValueError, match=r"not found in the base model.*q_proj \(2\)"):
            get_peft_model(base, PacaConfig(target_modules=["query"]))

    @pytest.mark.parametrize("targets", [TARGETS, "all-linear", r".*q_proj"])
    def test_rank_above_in_features_is_an_error_and_nothing_changes(self, base, targets):
        with pytest.raises(ValueError, match=r"`r` \(33\) must be in \[1, in_features=32\]"):
            get_peft_model(base, PacaConfig(r=33, target_modules=targets))
        assert not paca_layers(base)

    def test_parametrised_weight(self, base):
        torch.nn.utils.parametrizations.weight_norm(base.model.layers[1].self_attn.q_proj)
        with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj.*parametrised weight"):
            get_peft_model(base, PacaConfig(r=4, target_modules=TARGETS))
        assert not paca_layers(base)

    def test_unsupported_module(self, base):
        message = r"norm.*LlamaRMSNorm.*not supported. PaCA adapts torch.nn.Linear, .*Embedding"
        with pytest.raises(TypeError, match=message):
            get_peft_model(base, PacaConfig(r=4, target_modules=["norm"]))

    def test_patterns(self, base):
        model = adapt(base, rank_pattern={"layers.0.*q_proj": 6}, alpha_pattern={"v_proj": 3})
        attention = model.base_model.model.model.layers[0].self_attn
        assert attention.q_proj.r["default"] == 6
        assert attention.v_proj.scaling["default"] == 3 / 4


def test_bias_is_trained_and_saved(tmp_path):
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    peft_model = get_peft_model(model, PacaConfig(r=2, target_modules=["0"], bias="paca_only"))
    trained = [name for name, p in peft_model.named_parameters() if p.requires_grad]
    assert sorted(name.split(".", 2)[2] for name in trained) == [
        "0.base_layer.bias",
        "0.paca_delta.default.weight",
    ]
    peft_model(torch.randn(70, 10)).sum().backward()
    gradient = peft_model.base_model.model[0].bias.grad
    torch.testing.assert_close(gradient, model[1].weight.sum(0) * 70)
    assert any(name.endswith("bias") for name in get_peft_model_state_dict(peft_model))


def test_trainable_tokens_merge(base, ids):
    model = adapt(base, trainable_token_indices=[1, 2])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(1.0)
    want = logits(model, ids)
    torch.testing.assert_close(logits(model.merge_and_unload(), ids), want)


@needs("peft", "0.19")
def test_becomes_an_exact_lora(base, ids):
    from peft import convert_to_lora

    model = adapt(base)
    want = logits(model, ids)
    config, tensors = convert_to_lora(model, rank=4)
    lora = get_peft_model(base, config)
    lora.load_state_dict(
        {k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}, strict=False
    )
    assert isinstance(config, LoraConfig)
    torch.testing.assert_close(logits(lora, ids), want, atol=1e-4, rtol=1e-4)


def test_merging_a_thousand_times_in_bfloat16_changes_nothing(base):
    model = adapt(base.to(torch.bfloat16))
    layer = paca_layers(model)[0]
    before = layer.base_layer.weight.clone()
    for _ in range(1000):
        layer.merge()
        layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


def test_safe_merge_refuses_values_that_are_not_finite(base):
    model = adapt(base)
    layer = paca_layers(model)[0]
    layer.delta_of("default").data[0, 0] = float("inf")
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
