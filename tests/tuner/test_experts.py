"""Adapted expert parameters: against plain autograd through transformers' own eager forward."""

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from pacatune import PacaConfig
from tests.releases import needs
from tests.tuner.moe import (
    BOTH,
    Reference,
    adapt,
    assert_equal,
    build,
    deltas,
    fill,
    ids,
    layers,
    loss_of,
)

KINDS = ["mixtral", "qwen2", "qwen3", "gpt_oss", "llama4"]
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "paca" not in n}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "up", "down"])
def test_equal_to_reference(kind: str, implementation: str, targets: list[str]) -> None:
    base = build(kind)
    model = adapt(build(kind, implementation), target_parameters=targets)
    assert len(layers(model)) == 2 * len(targets)
    assert_equal(model, Reference(base, model), ids())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(kind: str, use_reentrant: bool) -> None:
    base = build(kind)
    model = adapt(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing_enable", FutureWarning)
        model.get_base_model().gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
        )
    model.enable_input_require_grads()
    model.train()
    assert_equal(model, Reference(base, model), ids())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4"])
def test_training_equals_reference(kind: str) -> None:
    base = build(kind)
    model = adapt(base, random=False)
    reference = Reference(base, model)
    losses = []
    for which, parameters in ((model, deltas(model)), (reference, reference.deltas)):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        losses.append([])
        for step in range(20):
            loss = loss_of(which, ids(step % 2))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0][-1] < losses[0][1]
    for name, parameter in frozen(model.get_base_model()).items():
        assert torch.equal(parameter, base.get_parameter(name)), name


def test_bfloat16_untrained_is_the_base() -> None:
    for kind in KINDS:
        base = build(kind, "grouped_mm", torch.bfloat16)
        model = adapt(base, random=False)
        assert torch.equal(model(input_ids=ids()).logits, base(input_ids=ids()).logits)


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
    model = get_peft_model(
        copy.deepcopy(base),
        PacaConfig(r=2, target_modules=[], target_parameters=["up_proj", "down_proj"]),
    )
    fill(model)
    x, index = torch.randn(5, 6, dtype=torch.float64), torch.tensor([[0, 3]] * 5)
    weights = torch.rand(5, 2, dtype=torch.float64)
    merged = copy.deepcopy(model).merge_and_unload()
    found = model.base_model.model["experts"](x, index, weights)
    torch.testing.assert_close(found, merged["experts"](x, index, weights), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, base["experts"](x, index, weights), atol=1e-3)


def saved_bytes(model: nn.Module) -> int:
    """Bytes that the first experts module keeps for backward beyond the weights, S = 14."""
    experts = next(m for name, m in model.named_modules() if name.endswith("layers.0.mlp.experts"))
    x = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)
    given = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # the tensors themselves, so that no address is used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in given and tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        experts(x, torch.tensor([[0, 3]] * 7), weights)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_only_trained_columns_of_routed_tokens_are_kept(kind: str, implementation: str) -> None:
    base = build(kind, implementation).requires_grad_(False)
    model = adapt(base)
    trained = saved_bytes(model)
    model.requires_grad_(False)
    frozen_bytes = saved_bytes(model)
    assert trained - frozen_bytes == 2 * 14 * 4 * 8  # two parameters, S * R, float64
    if implementation == "eager":  # torch's grouped GEMM does not take float64
        assert frozen_bytes <= saved_bytes(base)


def test_hooks_on_the_experts_run() -> None:
    base = build("mixtral")
    model = adapt(base)
    expected = model(input_ids=ids()).logits
    seen = []
    for layer in model.get_base_model().model.layers:
        layer.mlp.experts.base_layer.register_forward_hook(lambda *args: seen.append(args[0]))
    assert torch.equal(model(input_ids=ids()).logits, expected)
    assert len(seen) == 2
    assert all(module.config._experts_implementation == "eager" for module in seen)


def test_a_forward_that_passes_by_the_adapter_is_an_error() -> None:
    model = adapt(build("mixtral"))
    experts = model.get_base_model().model.layers[1].mlp.experts.base_layer
    experts.forward = lambda hidden_states, *args: hidden_states
    with pytest.raises(RuntimeError, match="The forward of MixtralExperts has been replaced"):
        model(input_ids=ids())
    assert experts.config._experts_implementation == "eager"


def test_offloaded_weights() -> None:
    from accelerate import cpu_offload

    model = adapt(build("gpt_oss"))
    expected = model(input_ids=ids()).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for n, p in model.named_parameters() if n.endswith("gate_up_proj"))
    torch.testing.assert_close(model(input_ids=ids()).logits, expected)


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


def test_rows_of_different_adapters_are_refused() -> None:
    model = adapt(build("mixtral")).eval()
    with pytest.raises(ValueError, match="`adapter_names` to a model with adapted experts"):
        model(input_ids=ids(), adapter_names=["default", "__base__", "default"])


@needs("peft", "0.20")
def test_peft_sees_the_base_under_its_own_names() -> None:
    from peft.utils import get_base_model_state_dict, set_base_model_state_dict

    base = build("gpt_oss")
    model = adapt(base)
    state = get_base_model_state_dict(model)
    assert set(state) == set(base.state_dict())
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in state.items())
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.experts.base_layer.down_proj.zero_()
    set_base_model_state_dict(model, base.state_dict())
    for name, parameter in frozen(model.get_base_model()).items():
        assert torch.equal(parameter, base.get_parameter(name)), name


def test_weights_that_would_get_no_gradient_are_refused() -> None:
    model = adapt(build("mixtral"))
    model.get_base_model().model.layers[0].mlp.experts.base_layer.down_proj.requires_grad_()
    with pytest.raises(ValueError, match=r"`down_proj` of MixtralExperts requires a gradient"):
        model(input_ids=ids())
    with torch.no_grad():
        model(input_ids=ids())


def test_repr_names_the_parameters() -> None:
    text = repr(adapt(build("gpt_oss")))
    assert "(gate_up_proj): paca.ExpertParameter(" in text
    assert "shape=(4, 16, 48)" in text
