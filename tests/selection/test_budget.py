"""Columns in one part of the blocks alone, with as many parameters as equal ranks have."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    Dinov2Config,
    DistilBertConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    T5Config,
    ViTConfig,
)

from pacatune import PacaConfig
from pacatune.selection import concentrate_ranks
from pacatune.selection.budget import PARTS
from tests.conftest import build_model
from tests.releases import needs
from tests.selection.nets import build

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=2, vocab_size=40),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40),
    "bert": BertConfig(**SIZES, intermediate_size=64, vocab_size=40),
    "distilbert": DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=40),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=64, vocab_size=40),
    "falcon": FalconConfig(**SIZES, vocab_size=40),
    "phi": PhiConfig(**SIZES, intermediate_size=64, vocab_size=40),
    "opt": OPTConfig(**SIZES, ffn_dim=64, vocab_size=40, word_embed_proj_dim=32),
    "t5": T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=40),
    "vit": ViTConfig(**SIZES, intermediate_size=64, image_size=32, patch_size=8),
    "dinov2": Dinov2Config(**SIZES, image_size=28, patch_size=14),
}


def make(name):
    config = MODELS[name]
    is_causal = name in ("llama", "gpt2", "gpt_neox", "falcon", "phi", "opt")
    with torch.device("meta"):
        return (AutoModelForCausalLM if is_causal else AutoModel).from_config(config)


def num_trained(model, config):
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", MODELS)
def test_attention_and_mlp_are_all_there_is(name):
    """Every default target is in one of the two; the last layers of each are the output."""
    found = {}
    for part in PARTS:
        config = concentrate_ranks(make(name), PacaConfig(r=2, paca_alpha=4), part)
        assert config.paca_alpha == 2 * config.r
        adapted = get_peft_model(make(name), config, low_cpu_mem_usage=True)
        found[part] = {n for n, m in adapted.named_modules() if hasattr(m, "paca_delta")}
    everything = get_peft_model(make(name), PacaConfig(r=2), low_cpu_mem_usage=True)
    targets = {n for n, m in everything.named_modules() if hasattr(m, "paca_delta")}
    assert found["attention"].isdisjoint(found["mlp"])
    assert found["attention"] | found["mlp"] == targets
    # One last layer for each attention (two in a decoder of T5) and each MLP.
    assert len(found["output"] & found["mlp"]) == (4 if name == "t5" else 2)
    assert len(found["output"] & found["attention"]) == (6 if name == "t5" else 2)


@pytest.mark.parametrize("part", PARTS)
def test_as_many_parameters_as_equal_ranks(part):
    model = lambda: build_model(40, intermediate_size=96)  # noqa: E731
    equal = num_trained(model(), PacaConfig(r=4))
    config = concentrate_ranks(model(), PacaConfig(r=4), part)
    found = num_trained(model(), config)
    # The nearest rank: off by half a column of each layer at most.
    assert abs(found - equal) <= found / config.r / 2


def test_names_are_short():
    config = concentrate_ranks(build_model(40), PacaConfig(r=4), "mlp")
    assert config.target_modules == {"gate_proj", "up_proj", "down_proj"}
    # The adapter is one that PEFT's own PaCA reads.
    assert config.needs_pacatune() == []


def test_other_options_count():
    config = PacaConfig(r=4, paca_alpha=8, layers_to_transform=[1], exclude_modules=["k_proj"])
    config.target_modules = {"q_proj", "k_proj", "o_proj", "down_proj", "up_proj"}
    found = concentrate_ranks(build_model(40), config, "output")
    assert (found.r, found.paca_alpha) == (10, 20)  # (32 + 32 + 64 + 32) / (32 + 32) * 4
    assert found.layers_to_transform == [1]
    assert config.target_modules == {"q_proj", "k_proj", "o_proj", "down_proj", "up_proj"}
    adapted = get_peft_model(build_model(40), found)
    names = {n.partition(".layers.")[2] for n, m in adapted.named_modules() if hasattr(m, "r")}
    assert names == {"1.self_attn.o_proj", "1.mlp.down_proj"}


def test_one_name_in_two_parts():
    """BERT's `output.dense` ends names in attention and after it."""
    model = make("bert")
    config = concentrate_ranks(model, PacaConfig(r=2), "mlp")
    adapted = get_peft_model(make("bert"), config, low_cpu_mem_usage=True)
    names = {n for n, m in adapted.named_modules() if hasattr(m, "paca_delta")}
    assert not any("attention" in name for name in names)
    assert len(names) == 4


@needs("transformers", "5")  # as all adapted experts
def test_experts():
    config = MixtralConfig(
        **SIZES, intermediate_size=64, num_key_value_heads=2, vocab_size=40, num_local_experts=2
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    paca = PacaConfig(r=2, target_modules=["q_proj", "o_proj"], target_parameters=names)
    assert concentrate_ranks(model, paca, "attention").target_parameters == []
    output = concentrate_ranks(model, paca, "output")
    assert output.target_parameters == ["experts.down_proj"]
    assert output.target_modules == {"o_proj"}
    assert concentrate_ranks(model, paca, "mlp").target_modules == set()


def test_torch_attention():
    net = build()
    config = PacaConfig(r=2, target_modules=["attention"])
    assert concentrate_ranks(net, config, "attention").target_modules == {"attention"}
    with pytest.raises(ValueError, match=r"none of the 1 targets, first 'attention.in_proj_weight"):
        concentrate_ranks(net, config, "output")


def test_refuses():
    model = build_model(40)
    with pytest.raises(ValueError, match=r"`part` \('heads'\) must be one of attention, mlp, out"):
        concentrate_ranks(model, PacaConfig(r=2), "heads")
    with pytest.raises(ValueError, match=r"`rank_pattern` .* is to decide about ranks; drop them"):
        concentrate_ranks(model, PacaConfig(r=2, rank_pattern={"q_proj": 3}), "mlp")
    with pytest.raises(ValueError, match=r"none of the 2 targets, first .*q_proj', is in this"):
        concentrate_ranks(model, PacaConfig(r=2, target_modules=["q_proj"]), "mlp")
    with pytest.raises(ValueError, match=r"gives '.*o_proj' 64 columns for the parameters of `r`"):
        concentrate_ranks(model, PacaConfig(r=16), "output")
    blocks = nn.ModuleList([nn.ModuleDict({"mixer": nn.Linear(4, 4)}) for _ in range(2)])
    with pytest.raises(ValueError, match=r"the name '0\.mixer' does not say whether it belongs to"):
        concentrate_ranks(blocks, PacaConfig(r=2, target_modules=["mixer"]), "mlp")
