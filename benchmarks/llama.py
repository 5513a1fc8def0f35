"""The model of the benchmarks: a small Llama with random weights, and its training step."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pacatune.measure.models import make_batch as make_rows
from pacatune.measure.models import make_model as make_measured

MAX_LENGTH = 512
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size of the Llama."""

    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None  # as many as attention heads
    vocab_size: int = 1024


def make_model(
    shape: Shape,
    dtype: torch.dtype,
    seed: int,
    quantization: str | None = None,
    device: torch.device = CPU,
) -> nn.Module:
    """Return a Llama with random weights, as `pacatune bench` measures one."""
    values = {"model_type": "llama", **dataclasses.asdict(shape)}
    return make_measured(
        values,
        dtype,
        device,
        seed=seed,
        quantization=quantization,
        max_length=MAX_LENGTH,
    )


def make_batch(num_tokens: int, vocab_size: int, seed: int) -> Tensor:
    """Return (B, T) random tokens, in rows of up to `MAX_LENGTH`, all of equal length."""
    num_rows = max(1, num_tokens // MAX_LENGTH)
    if num_tokens > MAX_LENGTH and num_tokens % MAX_LENGTH:
        raise ValueError(
            f"`tokens` ({num_tokens}) must be a multiple of {MAX_LENGTH}, the length of a row, or "
            "less than one row; round it."
        )
    return make_rows(num_rows, num_tokens // num_rows, vocab_size, seed)


def linear_layers(model: nn.Module) -> dict[nn.Module, str]:
    """Map each linear layer of the blocks, adapted or not, to its kind, such as `q_proj`."""
    return {
        module: name.rpartition(".")[2]
        for name, module in model.named_modules()
        if name.endswith("_proj")
    }
