"""The small Llama of the benchmarks, and what each method that is compared makes of it.

Every adapter is made by PEFT with the same rank, alpha (= rank, so that the factor is 1), targets
and defaults; every method that trains has torch's fused AdamW over its trainable parameters only.
Adapters are in float32, as PEFT makes them; models in bfloat16 run under autocast, as Trainer's do.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import llama_values, make_model
from benchmarks.models import make_batch as make_rows
from benchmarks.swap import swap_layers
from benchmarks.timing import Contender
from pacatune.measure.methods import add_adapter
from pacatune.methods import METHODS as ALL
from pacatune.methods import TEXT_METHODS
from pacatune.tuner.layer import PacaLayer

OURS = "paca"
SWAP = "swap"
METHODS = {name: ALL[name].summary for name in TEXT_METHODS} | {
    "frozen": "forward and input gradients of the frozen model: no adapter, no optimizer",
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
_LEARNING_RATE = 1e-4


def make_contender(
    method: str,
    values: dict[str, Any],
    dtype: torch.dtype,
    seed: int = 0,
    device: torch.device = CPU,
    **options: Any,
) -> Contender:
    """Return a Llama with random weights made a contender of a method, quantised if that asks.

    `values` are those of its configuration, `options` those of `adapt`.
    """
    plain, changes = _FORMS.get(method, (method, {}))
    model = make_model(
        values,
        dtype,
        device,
        seed=seed,
        quantization=ALL[plain].quantization if plain in ALL else None,
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


def adapt(
    model: nn.Module,
    method: str,
    *,
    rank: int,
    dropout: float = 0.0,
    seed: int,
    alpha: int | None = None,
    adapter_dtype: torch.dtype | None = None,
    targets: Collection[str] | str = (),
    heads: Sequence[str] = (),
) -> Contender:
    """Make a model on its device a contender, in place and in training mode.

    Args:
        model: With its weights.
        method: `frozen`, or one of `pacatune.methods.METHODS`.
        rank: Of every adapter.
        dropout: Of methods that have one.
        seed: Of the adapter's random values.
        alpha: The rank if None.
        adapter_dtype: Of what is trained; PEFT's choice if None.
        targets: Names of modules to adapt; by default the linear layers of the blocks.
        heads: Modules that every method but `frozen` trains in full.
    """
    model.requires_grad_(method == "full")
    row = ALL.get(method)
    if row is not None and row.has_adapter:
        model = add_adapter(
            model,
            row,
            rank=rank,
            alpha=alpha,
            dropout=dropout if row.dropout is not None else 0.0,
            targets=targets,
            heads=heads,
            seed=seed,
        )
        for parameter in model.parameters() if adapter_dtype is not None else ():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(adapter_dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_LEARNING_RATE, fused=True) if trained else None
    return Contender(method, model.train(), optimizer)


def autocast_of(dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype of autocast for weights of a dtype; None: without."""
    return None if dtype == torch.float32 else dtype


def make_batch(num_tokens: int, vocab_size: int, seed: int) -> Tensor:
    """Return (B, T) random tokens, in rows of up to `MAX_LENGTH`, all of equal length."""
    num_rows = max(1, num_tokens // MAX_LENGTH)
    if num_tokens > MAX_LENGTH and num_tokens % MAX_LENGTH:
        raise ValueError(f"`tokens` ({num_tokens}), above {MAX_LENGTH}, must be a multiple of it.")
    return make_rows(num_rows, num_tokens // num_rows, vocab_size, seed)
