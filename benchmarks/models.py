"""Small Llamas with random weights, and batches and losses of them."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pacatune.measure.models import is_4bit, quantize_

# Llama's proportions: the MLP is 8/3 as wide as the model, rounded up; 2-7B has 7.8 tokens per
# channel.
_ROUND_MLP_TO = 128
_TOKENS_PER_CHANNEL, _MAX_VOCAB = 8, 32000
_WIDE = 2048


def llama_values(
    hidden_size: int,
    num_layers: int,
    *,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    intermediate_size: int | None = None,
    vocab_size: int | None = None,
) -> dict[str, Any]:
    """Return the configuration values of a Llama, in Llama's proportions unless given.

    Heads have 128 channels from `hidden_size` 2048 on, else 64 or fewer.
    """
    dims = (128, 64, 32, 16, 8)[hidden_size < _WIDE :]
    fitting = (hidden_size // dim for dim in dims if hidden_size % dim == 0)
    heads = num_heads or next(fitting, 1)
    mlp = -(-(8 * hidden_size) // (3 * _ROUND_MLP_TO)) * _ROUND_MLP_TO
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size or mlp,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": num_kv_heads or heads,
        "vocab_size": vocab_size or min(_TOKENS_PER_CHANNEL * hidden_size, _MAX_VOCAB),
        "tie_word_embeddings": False,
    }


def make_model(
    values: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    *,
    seed: int,
    quantization: str | None = None,
) -> nn.Module:
    """Return a Llama whose embeddings ask for a gradient, in every method alike.

    Input gradients then flow through every layer: what a method does is exactly what the frozen
    model does and something more. Weights are random, and quantised to nf4 or fp4 if asked.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        model: Any = LlamaForCausalLM._from_config(
            LlamaConfig(**values | {"use_cache": False}), dtype=dtype, attn_implementation="sdpa"
        )
    if quantization is not None:
        from bitsandbytes.nn.modules import Params4bit

        make: Any = Params4bit
        weights = dict(model.named_parameters())
        quantize_(model, quantization, dtype)
        for name, layer in model.named_modules():
            if is_4bit(layer):
                weight = weights[f"{name}.weight"].detach()
                layer.weight = make(weight, **vars(layer.weight)).to(device)
    model.enable_input_require_grads()
    return cast(nn.Module, model)


def make_batch(num_rows: int, num_tokens: int, vocab_size: int, seed: int) -> Tensor:
    """Return (B, T) random tokens below `vocab_size`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (num_rows, num_tokens), generator=generator, device="cpu")


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the loss of (B, T) tokens, each of which learns the next one."""
    loss: Tensor = model(input_ids=batch, labels=batch).loss
    return loss


def loss_of_graph(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the same of a compiled model, whose graph begins after the embeddings.

    That their output asks for a gradient is no operation which a graph could hold: it would be cut
    into three.
    """
    embed: Any = cast(Any, model).get_input_embeddings()
    loss: Tensor = model(inputs_embeds=embed(batch), labels=batch).loss
    return loss
