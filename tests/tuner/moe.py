"""Tiny mixtures of experts, and what plain autograd says of them."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from pacatune import PacaConfig
from pacatune.ops.reference import adapted_experts
from pacatune.tuner.layout import is_transposed
from tests.releases import has

VOCAB_SIZE = 64
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def build(
    kind: str, implementation: str = "eager", dtype: torch.dtype = torch.float64, **changed: int
):
    """Return a random model of two layers: "mixtral", "qwen2", "qwen3", "gpt_oss", "llama4"."""
    import transformers

    if not has("transformers", "5"):
        pytest.skip("adapted experts need transformers >= 5")
    prefix, sizes = {
        "mixtral": ("Mixtral", {"intermediate_size": 24, "num_local_experts": 4}),
        "qwen2": (
            "Qwen2Moe",
            {
                "moe_intermediate_size": 8,
                "shared_expert_intermediate_size": 8,
                "num_experts": 6,
                "num_experts_per_tok": 3,
            },
        ),
        "qwen3": ("Qwen3Moe", {"moe_intermediate_size": 24, "num_experts": 8, "head_dim": 8}),
        "gpt_oss": ("GptOss", {"intermediate_size": 24, "num_local_experts": 4, "head_dim": 8}),
        "llama4": (
            "Llama4",
            {"intermediate_size_mlp": 24, "num_local_experts": 4, "head_dim": 8},
        ),
    }[kind]
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "experts_implementation": implementation,
    }
    config_class = f"{prefix}Config"
    if kind == "llama4":  # has one implementation
        config_class = f"{prefix}TextConfig"
        del settings["experts_implementation"]
    config = getattr(transformers, config_class)(**{**settings, **sizes, **changed})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
    return model.to(dtype).eval()


def adapt(base: nn.Module, *, random: bool = True, **options) -> nn.Module:
    """Return the base (a copy) with random updates of its experts."""
    options = {"target_parameters": BOTH, "target_modules": [], "r": 4, "paca_alpha": 6, **options}
    model = get_peft_model(copy.deepcopy(base), PacaConfig(**options), autocast_adapter_dtype=False)
    if random:
        fill(model)
    return model


def fill(model: nn.Module, adapter: str = "default") -> None:
    with torch.no_grad():
        for number, layer in enumerate(layers(model).values()):
            if adapter in layer.r:
                generator = torch.Generator().manual_seed(number)
                layer.delta_of(adapter).normal_(std=0.2, generator=generator)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the adapted layers by the name of what they adapt in the base model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {name: m for name, m in inner.named_modules() if hasattr(m, "paca_delta")}


def deltas(model: nn.Module, adapter: str = "default") -> list[nn.Parameter]:
    return [layer.delta_of(adapter) for layer in layers(model).values() if adapter in layer.r]


def ids(seed: int = 0, shape: tuple[int, int] = (3, 9)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, shape, generator=generator)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    # Not the model's own loss, which is float32 in a float64 model.
    logits = model(input_ids=tokens).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Reference(nn.Module):
    """The base model whose own forward runs with the adapted weights, made anew in each call."""

    def __init__(self, base: nn.Module, model: nn.Module, *adapters: str) -> None:
        super().__init__()
        self.base = copy.deepcopy(base).requires_grad_(False)
        self.updates = []
        self.deltas = nn.ParameterList()
        for adapter in adapters or ("default",):
            for name, layer in layers(model).items():
                if adapter in layer.r:
                    self.deltas.append(layer.delta_of(adapter).detach().clone())
                    columns, scaling = layer.paca_indices[adapter], layer.scaling[adapter]
                    self.updates.append((name, columns, scaling))

    def forward(self, **inputs):
        parameters = dict(self.base.named_parameters())
        for (name, columns, scaling), delta in zip(self.updates, self.deltas, strict=True):
            experts = self.base.get_submodule(name.rpartition(".")[0])
            parameters[name] = adapted_experts(
                parameters[name], delta, columns, scaling, is_transposed=is_transposed(experts)
            )
        return torch.func.functional_call(self.base, parameters, (), inputs)


def assert_equal(model: nn.Module, reference: Reference, tokens: Tensor, tolerance=1e-6) -> None:
    """Logits and the gradients of all deltas are those of the reference.

    The routers of all models are computed in float32, whatever the model's dtype.
    """
    found, expected = [], []
    for which, parameters, results in (
        (model, deltas(model), found),
        (reference, list(reference.deltas), expected),
    ):
        which.zero_grad()
        logits = which(input_ids=tokens).logits
        logits.square().mean().backward()
        results += [logits.detach(), *(parameter.grad for parameter in parameters)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
