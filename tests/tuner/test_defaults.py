"""What is adapted where `target_modules` is not set: the rules, on the smallest models."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from pacatune import PacaConfig
from pacatune.tuner.defaults import default_targets, log_targets, survey
from tests.tuner.nets import layers
from tools.families import FAMILIES


class Block(nn.Module):
    """A linear layer, torch's attention, and a router beside experts."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.attention = nn.MultiheadAttention(8, 2)
        self.moe = nn.Module()
        self.moe.gate = nn.Linear(8, 2)
        self.moe.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])


class Model(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.blocks = blocks
        self.head = nn.Linear(12, 4)


@pytest.fixture
def llama():
    return FAMILIES["Llama"].build()


@pytest.mark.parametrize("container", [nn.ModuleList, lambda blocks: nn.Sequential(*blocks)])
def test_linear_layers_of_repeated_blocks_are_found_in_any_model(container):
    model = Model(container([Block(), Block()]))
    reasons = survey(model)
    assert {name for name, reason in reasons.items() if not reason} == {
        f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "moe.experts.0", "moe.experts.1")
    }
    assert reasons["stem.0"] == reasons["head"] == "outside the blocks"
    assert reasons["blocks.0.moe.gate"] == "router"
    assert reasons["blocks.0.attention"] == "torch's MultiheadAttention"
    assert reasons["blocks.0.attention.out_proj"] == "torch's MultiheadAttention"


def test_names_are_as_short_as_tells_them_apart():
    model = Model(nn.ModuleList([Block(), Block()]))
    model.up = nn.Linear(8, 8)
    assert default_targets(model) == {"0.up", "1.up", "experts.0", "experts.1"}
    assert default_targets(FAMILIES["BERT"].build()) == {
        *("query", "key", "value", "intermediate.dense", "output.dense")
    }


def mamba():
    sizes = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4}
    return MambaForCausalLM(MambaConfig(**sizes))


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), {}, "Please specify `target_modules` in .*: Seq"),
        (mamba, {}, r"has no repeated blocks.*in_proj \(1\), lm_head \(1\)"),
        (
            FAMILIES["Gemma 3 (multimodal)"].build,  # its default is a regular expression
            {"layers_to_transform": [1]},
            r"`layers_to_transform` .* cannot be used when",
        ),
    ],
)
def test_models_that_need_names(build, options, message):
    base = build()
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, PacaConfig(r=2, **options))
    assert not layers(base)


def test_a_second_adapter_gets_the_same_targets(llama):
    expected = default_targets(llama)
    with torch.device("meta"):
        assert default_targets(FAMILIES["Llama"].build()) == expected
    model = get_peft_model(llama, PacaConfig(r=2))
    model.add_adapter("other", PacaConfig(r=3))
    assert {config.target_modules == expected for config in model.peft_config.values()} == {True}
    assert all("other" in layer.r for layer in layers(model).values())
    # A layer with an adapter has children; it is still no block.
    model = Model(nn.ModuleList([Block()]))
    model.experts = nn.ModuleList([nn.Linear(8, 8)])
    model = get_peft_model(model, PacaConfig(r=2, target_modules=["experts.0", "up"]))
    assert survey(model.base_model.model)["experts.0"] == "outside the blocks"


def test_a_matrix_of_the_model_itself_has_no_name_to_log(caplog):
    model = Model(nn.ModuleList([Block(), Block()]))
    model.weight = nn.Parameter(torch.zeros(3, 4))  # as timm's ViT has its positions
    assert survey(model)[""]
    with caplog.at_level("WARNING", "pacatune"):
        log_targets(model)
    assert "it leaves out 0, attention, gate, head, out_proj." in caplog.text
