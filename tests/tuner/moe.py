"""Tiny mixtures of experts, and what plain autograd says of them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.releases import has
from tests.tuner import nets

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
        "llama4": ("Llama4", {"intermediate_size_mlp": 24, "num_local_experts": 4, "head_dim": 8}),
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


def adapt(base: nn.Module, **options) -> nn.Module:
    return nets.adapt(base, **{"target_parameters": BOTH, "target_modules": [], "r": 4, **options})


def ids(seed: int = 0, shape: tuple[int, int] = (3, 9)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, shape, generator=generator)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    # Not the model's own loss, which is float32 in a float64 model.
    logits = model(input_ids=tokens).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def assert_equal(model: nn.Module, base: nn.Module, *adapters: str) -> None:
    """Logits and the gradients of all deltas are those of plain autograd.

    The routers of all models are computed in float32, whatever the model's dtype.
    """
    reference = nets.Reference(base, model, *adapters)
    nets.assert_equal(model, reference, input_ids=ids(), tolerance=1e-6)
