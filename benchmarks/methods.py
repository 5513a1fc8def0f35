"""The small Llama of the benchmarks, and what each method that is compared makes of it.

Every adapter is made by PEFT with the same rank, alpha (= rank, so that the factor is 1), targets
and defaults; every method that trains has torch's fused AdamW over its trainable parameters only.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.swap import swap_layers
from pacatune.measure.methods import Contender, adapt
from pacatune.measure.models import make_batch as make_rows
from pacatune.measure.models import make_model
from pacatune.measure.setting import quantization_of
from pacatune.tuner.layer import PacaLayer

OURS = "paca"
SWAP = "swap"
METHODS = {
    "frozen": "forward and input gradients of the frozen model: no adapter, no optimizer",
    OURS: "ours, r = 8",
    SWAP: "columns swapped in and out around every matmul (PEFT 0.22's way), r = 8",
    "lora": "PEFT's LoRA, r = 8, no dropout",
    "lora_r4": "PEFT's LoRA, r = 4: about as many trained parameters as paca",
    "lora_dropout": "PEFT's LoRA, r = 8, dropout 0.1",
    "dora": "PEFT's DoRA, r = 8",
    "full": "every weight trained",
    "paca_g8": "ours, r = 8 in each of 8 row groups",
    "additive": "ours in plain autograd, weight untouched: the fallback's form, r = 8",
}
OPTIONAL = ("paca_g8", "additive")
"""Measured only where asked for."""
# Those that are another method with something changed.
_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    SWAP: (OURS, {}),
    "additive": (OURS, {}),
    "paca_g8": (OURS, {"groups": 8}),
    "lora_r4": ("lora", {"rank": 4, "alpha": 4}),
}
RANK, DROPOUT = 8, 0.1
MAX_LENGTH = 512
CPU = torch.device("cpu")
Shape = dict[str, int]
"""Sizes of a Llama, under the names of its configuration."""
SHAPE: Shape = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 1024,
}


def make_contender(
    method: str,
    shape: Shape,
    dtype: torch.dtype,
    seed: int = 0,
    device: torch.device = CPU,
    **options: Any,
) -> Contender:
    """Return a Llama with random weights made a contender of a method, quantised if that asks.

    Methods are `METHODS` and those of `pacatune bench`; `options` those of
    `pacatune.measure.methods.adapt`.
    """
    plain, changes = _FORMS.get(method, (method, {}))
    model = make_model(
        {"model_type": "llama", **shape},
        dtype,
        device,
        seed=seed,
        quantization=quantization_of(plain),
        max_length=MAX_LENGTH,
    )
    options = {"rank": RANK, "dropout": DROPOUT, "seed": seed} | options | changes
    contender = adapt(model, plain, **options)
    if method == SWAP:
        swap_layers(contender.model)
    if method == "additive":
        for layer in contender.model.modules():
            if isinstance(layer, PacaLayer):
                names = layer.active_adapters
                layer.forward = partial(layer._additive_forward, names=names)
    return replace(contender, method=method)


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
