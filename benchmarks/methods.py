"""The small Llama of the benchmarks, and what each method that is compared makes of it.

Every adapter is made by PEFT with the same rank, alpha (= rank, so that the factor is 1), targets
and defaults; every method that trains has torch's fused AdamW over its trainable parameters only.
Adapters are in float32, as PEFT makes them; models in bfloat16 run under autocast, as Trainer's do.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.swap import swap_layers
from pacatune.measure.methods import Contender, adapt
from pacatune.measure.models import llama_values, make_model
from pacatune.measure.models import make_batch as make_rows
from pacatune.measure.setting import METHODS as MEASURED
from pacatune.measure.setting import BenchConfig
from pacatune.tuner.layer import PacaLayer

OURS = "paca"
SWAP = "swap"
METHODS = {name: method.summary for name, method in MEASURED.items()} | {
    SWAP: "columns swapped in and out around every matmul (PEFT 0.22's way)",
    "lora": "PEFT's LoRA, its adapters in float32 (under autocast where weights are in bfloat16)",
    "lora_bf16": "PEFT's LoRA with its adapters in bfloat16, under autocast",
    "lora_r8": "PEFT's LoRA of half the rank: about as many trained parameters as paca",
    "additive": "ours in plain autograd, weight untouched: the fallback's form",
}
USUAL = ("frozen", OURS, SWAP, "lora", "lora_bf16", "lora_r8", "lora_dropout", "dora", "full")
"""Those that are measured unless asked otherwise."""
# Those that are another method with something changed.
_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    SWAP: (OURS, {}),
    "additive": (OURS, {}),
    "lora_r8": ("lora", {"rank": 8, "alpha": 8}),
    "lora_bf16": ("lora", {"adapter_dtype": torch.bfloat16}),
}
RANK, DROPOUT = 16, 0.1
MAX_LENGTH = 512
CPU = torch.device("cpu")
VALUES = llama_values(512, 8, vocab_size=1024)


def make_contender(
    method: str,
    values: dict[str, Any],
    dtype: torch.dtype,
    seed: int = 0,
    device: torch.device = CPU,
    **options: Any,
) -> Contender:
    """Return a Llama with random weights made a contender of a method, quantised if that asks.

    `values` are those of its configuration, `options` those of `pacatune.measure.methods.adapt`.
    """
    plain, changes = _FORMS.get(method, (method, {}))
    model = make_model(
        values,
        dtype,
        device,
        seed=seed,
        quantization=MEASURED[plain].quantization,
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


def autocast_of(dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype of autocast for weights of a dtype; None: without."""
    return None if dtype == torch.float32 else dtype


def make_batch(num_tokens: int, vocab_size: int, seed: int) -> Tensor:
    """Return (B, T) random tokens, in rows of up to `MAX_LENGTH`, all of equal length."""
    config = BenchConfig(values={}, title="", tokens=(num_tokens,), seq_len=MAX_LENGTH)
    (size,) = config.settings
    return make_rows(size.num_rows, size.num_tokens, vocab_size, seed)
