"""Small language models with random weights, and batches and losses of them.

Everything is found out from the configuration; no code that comes with a model is ever executed.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from pacatune.measure.models import is_4bit, make_skeleton, quantize_

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


def make_config(values: dict[str, Any], max_length: int = 0) -> PreTrainedConfig:
    """Return the configuration with these values, without a cache, for rows up to `max_length`."""
    config: PreTrainedConfig = AutoConfig.for_model(**(values | {"use_cache": False}))
    if getattr(config, "max_position_embeddings", max_length) < max_length:
        config.max_position_embeddings = max_length
    return config


def make_model(
    values: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    *,
    seed: int,
    quantization: str | None = None,
    max_length: int = 0,
) -> nn.Module:
    """Return a causal language model whose embeddings ask for a gradient, in every method alike.

    Input gradients then flow through every layer: what a method does is exactly what the frozen
    model does and something more. Weights are random; with `quantization` (nf4 or fp4) no more
    than one layer is ever there unquantised. `max_length` is the length of the longest row.
    """
    model: Any = make_skeleton(make_config(values, max_length), values["model_type"], dtype)
    if quantization is not None:
        quantize_(model, quantization, dtype)
    torch.manual_seed(seed)
    for module in model.modules():
        if is_4bit(module):
            _fill_quantized(model, module, dtype, device)
        elif any(tensor.is_meta for tensor in _own_tensors(module)):
            module.to_empty(device=device, recurse=False)
            with torch.no_grad():
                for tensor in _own_tensors(module):
                    tensor.zero_()  # in case the model's own rule forgets one
                model._init_weights(module)
    model.tie_weights()
    model.enable_input_require_grads()
    return cast(nn.Module, model)


def _fill_quantized(model: Any, layer: Any, dtype: torch.dtype, device: torch.device) -> None:
    from bitsandbytes.nn.modules import Params4bit

    std = getattr(model.config, "initializer_range", 0.02)
    weight = torch.empty(layer.out_features, layer.in_features, dtype=dtype, device=device)
    make: Any = Params4bit
    layer.weight = make(weight.normal_(std=std), **vars(layer.weight)).to(device)
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=dtype, device=device))


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


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
