"""Adapted experts of transformers' models: plain autograd through their own eager forward (R1).

test_every_kind.py has all that every layer does; here are models of several parameters.
"""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from pacatune import PacaConfig
from tests.releases import needs
from tests.tuner import nets
from tests.tuner.moe import BOTH, adapt, assert_equal, build, ids
from tests.tuner.nets import deltas, evaluate, fill, layers

KINDS = ["mixtral", "qwen2", "qwen3", "gpt_oss", "llama4"]
UP, DOWN = BOTH[:1], BOTH[1:]


def logits(model: nn.Module) -> torch.Tensor:
    return evaluate(model, input_ids=ids()).logits


@pytest.mark.parametrize(
    ("kind", "implementation", "targets"),
    [
        *((kind, "eager", BOTH) for kind in KINDS),
        ("mixtral", "grouped_mm", UP),
        ("qwen2", "batched_mm", DOWN),
        ("qwen3", "grouped_mm", BOTH),
        ("gpt_oss", "grouped_mm", DOWN),
        ("gpt_oss", "eager", UP),
        ("llama4", "eager", UP),
        ("llama4", "eager", DOWN),
    ],
)
def test_equal_to_reference_and_merged(kind: str, implementation: str, targets: list[str]) -> None:
    base = build(kind)
    model = adapt(build(kind, implementation), target_parameters=targets)
    assert len(layers(model)) == 2 * len(targets)
    assert_equal(model, base)
    want = logits(model)
    model.merge_adapter()
    if implementation == "eager":  # torch's grouped GEMM does not take float64
        torch.testing.assert_close(logits(model), want, atol=1e-6, rtol=1e-6)


@needs("transformers", "5")  # has the interface
def test_experts_without_gate_and_with_a_norm() -> None:
    """Two options of transformers' interface that the models above do not use."""
    from transformers.integrations.moe import use_experts_implementation

    class Plain(nn.Module):
        def __init__(self, config) -> None:
            super().__init__()
            self.num_experts = 4
            self.up_proj = nn.Parameter(torch.randn(4, 8, 6, dtype=torch.float64))
            self.down_proj = nn.Parameter(torch.randn(4, 6, 8, dtype=torch.float64))
            self.act_fn = nn.SiLU()
            self.post_expert_norm = nn.LayerNorm(6, dtype=torch.float64)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise NotImplementedError

    class Config:
        _experts_implementation = "batched_mm"

    torch.manual_seed(0)
    try:
        experts_class = use_experts_implementation(has_gate=False, has_post_expert_norm=True)(Plain)
    except TypeError:  # transformers 5.17
        experts_class = use_experts_implementation(has_gate=False)(Plain)
    base = nn.ModuleDict({"experts": experts_class(Config())})
    model = nets.adapt(base, target_modules=[], target_parameters=["up_proj", "down_proj"])
    x, index = torch.randn(5, 6, dtype=torch.float64), torch.tensor([[0, 3]] * 5)
    weights = torch.rand(5, 2, dtype=torch.float64)
    merged = copy.deepcopy(model).merge_and_unload()
    found = model.base_model.model["experts"](x, index, weights)
    torch.testing.assert_close(found, merged["experts"](x, index, weights))
    assert not torch.allclose(found, base["experts"](x, index, weights), atol=1e-3)


def test_a_forward_that_passes_by_the_adapter_is_an_error() -> None:
    model = adapt(build("mixtral"))
    experts = model.get_base_model().model.layers[1].mlp.experts.base_layer
    experts.forward = lambda hidden_states, *args: hidden_states
    with pytest.raises(RuntimeError, match="The forward of MixtralExperts has been replaced"):
        model(input_ids=ids())


# Dynamo itself instantiates autograd Functions while it traces them.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4"])
def test_compiles_in_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    base = build(kind, "grouped_mm", torch.float32)
    model = adapt(base)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(deltas(model), lr=0.1)
    for step in range(3):
        gradients = []
        for forward in (model, compiled):
            optimizer.zero_grad()
            forward(input_ids=ids(step)).logits.square().mean().backward()
            gradients.append([delta.grad.clone() for delta in deltas(model)])
        for eager, ours in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-4)
        optimizer.step()
    assert counter.frame_count == 1


def test_weights_that_would_get_no_gradient_are_refused() -> None:
    model = adapt(build("mixtral"))
    model.get_base_model().model.layers[0].mlp.experts.base_layer.down_proj.requires_grad_()
    with pytest.raises(ValueError, match=r"`down_proj` of MixtralExperts requires a gradient"):
        model(input_ids=ids())
    evaluate(model, input_ids=ids())


class TestFiles:
    def test_names_do_not_depend_on_what_else_is_adapted(self) -> None:
        names = set(get_peft_model_state_dict(adapt(build("mixtral"))))
        one = set(get_peft_model_state_dict(adapt(build("mixtral"), target_parameters=DOWN)))
        stem = "base_model.model.model.layers.0.mlp.experts"
        assert f"{stem}.down_proj.paca_delta" in one < names
        assert f"{stem}.gate_up_proj.paca_indices" in names - one

    @needs("peft", "0.20")  # 0.19 cannot beside transformers 5.14, nor LoRA for experts
    def test_transformers_loads_it(self, tmp_path) -> None:
        base = build("qwen3", dtype=torch.float32)
        model = adapt(base)
        model.save_pretrained(tmp_path)
        base.load_adapter(str(tmp_path))
        torch.testing.assert_close(logits(base), logits(model))


def test_a_second_adapter_has_parameters_that_the_first_has_not() -> None:
    base = build("gpt_oss")
    model = adapt(base, target_parameters=DOWN, target_modules=["q_proj"])
    before = logits(model)
    options = {"target_modules": [], "target_parameters": BOTH, "random_seed": 5}
    model.add_adapter("other", PacaConfig(r=3, **options))
    fill(model, "other")
    assert torch.equal(logits(model), before)
    assert not any(delta.requires_grad for delta in deltas(model, "other"))
    model.set_adapter("other")
    assert_equal(model, base, "other")
    model.base_model.set_adapter(["default", "other"])
    assert_equal(model, base, "default", "other")
    model.set_adapter("default")
    model.delete_adapter("other")
    assert not deltas(model, "other")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_parameters_of_a_copy_share_their_module(copied) -> None:
    model = copied(adapt(build("mixtral")))
    for name, layer in layers(model).items():
        owner = model.get_base_model().get_submodule(name.rpartition(".")[0])
        assert layer.base_layer is owner.base_layer


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
