"""Which expert parameters are adapted: names, layers, patterns, and what is refused."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from pacatune import PacaConfig
from pacatune.selection import seed_for
from tests.tuner.moe import BOTH, adapt, build, layers


def test_unset_target_modules_are_the_default_ones() -> None:
    """As PEFT does; an empty list means the parameters alone."""
    model = get_peft_model(build("qwen2"), PacaConfig(r=2, target_parameters=["down_proj"]))
    kinds = {name.rpartition(".")[2] for name in layers(model)}
    assert {"q_proj", "down_proj"} < kinds
    assert len([name for name in layers(model) if name.endswith("experts.down_proj")]) == 2


def test_a_second_adapters_target_modules_do_not_mean_parameters() -> None:
    model = adapt(build("qwen2"), target_parameters=BOTH[1:])
    model.add_adapter("other", PacaConfig(r=2, target_modules=["down_proj"]))
    assert {name for name, layer in layers(model).items() if "other" in layer.r} == {
        f"model.layers.{number}.mlp.shared_expert.down_proj" for number in (0, 1)
    }


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [1]},
        {"exclude_modules": ["layers.0.mlp.experts"]},
        {"exclude_modules": r".*layers\.0\..*"},
        {"target_parameters": ["layers.1.mlp.experts.down_proj"]},
    ],
)
def test_some_layers_only(options) -> None:
    model = adapt(build("mixtral"), **{"target_parameters": BOTH[1:], **options})
    assert list(layers(model)) == ["model.layers.1.mlp.experts.down_proj"]


def test_columns_follow_from_seed_and_name() -> None:
    model = adapt(build("mixtral"), random_seed=3)
    for name, layer in layers(model).items():
        generator = torch.Generator().manual_seed(seed_for(3, name))
        columns = torch.randperm(layer.in_features, generator=generator)[:4].sort().values
        assert torch.equal(layer.paca_indices["default"], columns)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"target_parameters": ["experts.up"]},
            ValueError,
            r"\['experts.up'\] match no parameter of MixtralForCausalLM. It has these expert "
            r"parameters: experts.down_proj \(2\), experts.gate_up_proj \(2\)\.",
        ),
        (
            {"target_parameters": ["q_proj.weight"]},
            ValueError,
            r"q_proj.weight' has shape \(16, 16\); it must be the three-dimensional weight of all "
            r"experts. Layers are named in `target_modules`. It has these expert parameters",
        ),
        (
            {"target_parameters": BOTH, "layers_to_transform": [7]},
            ValueError,
            r"every parameter of these names is left out by `exclude_modules`",
        ),
        ({"r": 17}, ValueError, r"`r` \(17\) must be in \[1, in_features=16\] for .*gate_up_proj"),
        (
            {"target_parameters": "experts.down_proj"},
            TypeError,
            r"`target_parameters` \('experts.down_proj'\) must be a list of names",
        ),
    ],
)
def test_errors(options, error, message: str) -> None:
    base = build("mixtral")
    before = [type(module) for module in base.modules()]
    with pytest.raises(error, match=message):
        get_peft_model(base, PacaConfig(**{"target_parameters": BOTH, **options}))
    assert [type(module) for module in base.modules()] == before


def test_trained_biases_of_experts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`bias` \('all'\) must be 'none' with .*experts have"):
        adapt(build("gpt_oss"), bias="all")


def test_experts_that_pass_by_the_interface_are_refused() -> None:
    class OwnExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 4))
            self.down_proj = nn.Parameter(torch.zeros(2, 4, 4))

    base = nn.Module()
    base.experts = OwnExperts()
    with pytest.raises(TypeError, match=r"\(OwnExperts\) is not supported.*parameters: none"):
        adapt(base)


def test_quantised_and_sharded_experts_are_refused() -> None:
    base = build("mixtral")
    experts = base.model.layers[0].mlp.experts
    packed = torch.zeros_like(experts.down_proj, dtype=torch.uint8)
    experts.down_proj = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(TypeError, match=r"is torch.uint8 Parameter; quantised and sharded experts"):
        adapt(base)


def test_experts_of_several_devices_are_refused() -> None:
    base = build("mixtral")
    base.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(TypeError, match=r"quantised and sharded experts are not supported"):
        adapt(base)


def test_patterns_that_match_nothing_are_named() -> None:
    with pytest.raises(ValueError, match="`alpha_pattern`: 'down' matches nothing that is adapted"):
        adapt(build("mixtral"), alpha_pattern={"down": 2, "down_proj": 4})
