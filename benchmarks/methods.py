"""The methods that are compared: what each makes of a model, and what it trains.

Every adapter is made by PEFT with the same rank, alpha (= rank, so that the factor is 1), targets
and defaults; every method that trains has torch's fused AdamW over its trainable parameters only.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn

from benchmarks.swap import swap_layers
from pacatune import PacaConfig
from pacatune.measure.methods import Contender
from pacatune.measure.methods import adapt as make_contender
from pacatune.methods import METHODS as TABLE
from pacatune.methods import adapter_config as make_config
from pacatune.methods import size_options
from pacatune.tuner.layer import PacaLayer

OURS = "paca"
SWAP = "swap"
METHODS = {
    "frozen": "forward and input gradients of the frozen model: no adapter, no optimizer",
    "paca": "ours, r = 8",
    SWAP: "columns swapped in and out around every matmul (PEFT 0.22's way), r = 8",
    "lora": "PEFT's LoRA, r = 8, no dropout",
    "lora_r4": "PEFT's LoRA, r = 4: about as many trained parameters as paca",
    "lora_dropout": "PEFT's LoRA, r = 8, dropout 0.1",
    "dora": "PEFT's DoRA, r = 8",
    "full": "every weight trained",
}
# Measured only where asked for.
_OPTIONAL = {
    "paca_g8": "ours, r = 8 in each of 8 row groups",
    "additive": "ours in plain autograd, weight untouched: the fallback's form, r = 8",
}
RANK, DROPOUT = 8, 0.1
# Those that are another method with something changed.
_PLAIN = {SWAP: OURS, "additive": OURS, "paca_g8": OURS, "lora_r4": "lora"}
_GROUPS = {"paca_g8": 8}
_RANKS = {"lora_r4": 4}


def all_methods() -> dict[str, str]:
    """Return every method with its description, the optional ones last."""
    return METHODS | _OPTIONAL


def adapt(
    model: nn.Module,
    method: str,
    *,
    targets: str | list[str],
    seed: int,
) -> Contender:
    """Make `model` a contender of one of `all_methods()`, in place: `pacatune.measure.methods`."""
    if method not in all_methods():
        raise ValueError(f"`method` ({method!r}) must be one of {sorted(all_methods())}.")
    plain, rank = _PLAIN.get(method, method), _RANKS.get(method, RANK)
    contender = make_contender(
        model,
        plain,
        rank=rank,
        dropout=DROPOUT,
        seed=seed,
        targets=targets,
        groups=_GROUPS.get(method, 1),
    )
    if method == SWAP:
        swap_layers(contender.model)
    if method == "additive":
        _make_additive(contender.model)
    return replace(contender, method=method)


def adapter_config(method: str, targets: str | list[str], seed: int) -> PacaConfig | LoraConfig:
    """Return the PEFT configuration of a method that has one."""
    row, rank = TABLE[_PLAIN.get(method, method)], _RANKS.get(method, RANK)
    options = size_options(row, rank, rank, DROPOUT if row.dropout else 0.0)
    if row.is_paca:
        options |= {"random_seed": seed, "groups": _GROUPS.get(method, 1)}
    return make_config(row, **options, target_modules=targets)  # type: ignore[return-value]


def _make_additive(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, PacaLayer):
            layer.forward = _additive_forward(layer)


def _additive_forward(layer: Any) -> Callable[[Tensor], Tensor]:
    names = layer.active_adapters
    return lambda x: layer._additive_forward(x, names)
