"""The small Llama of the benchmarks, and what each method that is compared makes of it.

Every adapter is made by PEFT with the same rank, alpha (= rank, so that the factor is 1), targets
and defaults; every method that trains has torch's fused AdamW over its trainable parameters only.
Adapters are in float32, as PEFT makes them; models in bfloat16 run under autocast, as Trainer's do.
"""

from functools import partial
from typing import Any

import torch

from benchmarks.models import llama_values, make_model
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
    "channels": "ours of the same rank over 64 columns of each weight",
    "all_channels": "ours of the same rank over all columns: LoRA in place",
}
USUAL = ("frozen", OURS, SWAP, "lora", "lora_bf16", "lora_r8", "lora_dropout", "dora", "full")
"""Those that are measured unless asked otherwise."""
# Those that are another method with something changed.
_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    SWAP: (OURS, {}),
    "additive": (OURS, {}),
    "channels": (OURS, {"channels": 64}),
    "all_channels": (OURS, {"channels": 1.0}),
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
    """Return a Llama with random weights made a contender of a method, in training mode.

    Args:
        method: One of `METHODS`, or any of `pacatune.methods.METHODS`.
        values: Those of its configuration.
        dtype: Of its weights, which are quantised if the method asks.
        seed: Of weights and adapter.
        device: Where it is.
        **options: `rank`, `alpha` (the rank), `dropout` (of methods that have one) and
            `adapter_dtype` (PEFT's choice).
    """
    plain, changes = _FORMS.get(method, (method, {}))
    row = ALL.get(plain)
    quantization = None if row is None else row.quantization
    model = make_model(values, dtype, device, seed=seed, quantization=quantization)
    model.requires_grad_(method == "full")
    if row is not None and row.has_adapter:
        options = {"rank": RANK, "dropout": DROPOUT} | options | changes
        adapter_dtype = options.pop("adapter_dtype", None)
        options["dropout"] *= row.dropout is not None
        model = add_adapter(model, row, seed=seed, **options)
        for parameter in model.parameters() if adapter_dtype is not None else ():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(adapter_dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_LEARNING_RATE, fused=True) if trained else None
    if method == SWAP:
        swap_layers(model)
    if method == "additive":
        for layer in model.modules():
            if isinstance(layer, PacaLayer):
                names = layer.active_adapters
                layer.forward = partial(layer._additive_forward, names=names)
    return Contender(method, model.train(), optimizer)
