"""The methods that are compared: what each makes of a model, and what it trains.

Every adapter is made by PEFT with the same rank, alpha (= rank, so that the factor is 1), targets
and defaults; every method that trains has torch's fused AdamW over its trainable parameters only.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.swap import swap_layers
from pacatune import PacaConfig
from pacatune.bench.methods import Contender
from pacatune.tuner.layer import PacaLayer

__all__ = ["HEAD", "METHODS", "OURS", "RANK", "adapt", "adapter_config", "all_methods"]

OURS = "paca"
HEAD = "head"  # of models that have one to train
METHODS = {
    "frozen": "forward and input gradients of the frozen model: no adapter, no optimizer",
    "paca": "ours, r = 8",
    "swap": "columns swapped in and out around every matmul (PEFT 0.22's way), r = 8",
    "lora": "PEFT's LoRA, r = 8, no dropout",
    "lora_r4": "PEFT's LoRA, r = 4: about as many trained parameters as paca",
    "lora_dropout": "PEFT's LoRA, r = 8, dropout 0.1",
    "dora": "PEFT's DoRA, r = 8",
    "full": "every weight trained",
}
# Measured only where asked for.
_OPTIONAL = {"additive": "ours in plain autograd, weight untouched: the fallback's form, r = 8"}
RANK = 8
_LEARNING_RATE = 1e-4


def all_methods() -> dict[str, str]:
    """Return every method with its description, the optional ones last."""
    return METHODS | _OPTIONAL


def adapt(
    model: nn.Module,
    method: str,
    *,
    targets: str | list[str],
    seed: int,
    heads: Sequence[str] = (),
) -> Contender:
    """Make `model` a contender, in training mode.

    Args:
        model: Untouched, in the dtype of the comparison; adapted in place.
        method: One of `all_methods()`, or `HEAD` where there are heads.
        targets: PEFT's `target_modules`.
        seed: Of PaCA's columns and LoRA's start.
        heads: Names of modules that every method but `frozen` trains in full.

    Raises:
        ValueError: If `method` is unknown.
    """
    known = [*all_methods(), *([HEAD] if heads else [])]
    if method not in known:
        raise ValueError(f"`method` ({method!r}) must be one of {sorted(known)}.")
    model.requires_grad_(method == "full")
    if method == HEAD:
        for name in heads:
            model.get_submodule(name).requires_grad_()
    elif method not in ("frozen", "full"):
        torch.manual_seed(seed)
        config = adapter_config(method, targets, seed)
        config.modules_to_save = list(heads) or None
        model = get_peft_model(model, config)
    if method == "swap":
        swap_layers(model)
    if method == "additive":
        _make_additive(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_LEARNING_RATE, fused=True) if trained else None
    return Contender(method, model.train(), optimizer)


def adapter_config(method: str, targets: str | list[str], seed: int) -> PacaConfig | LoraConfig:
    """Return the PEFT configuration of a method that has one."""
    if method in ("paca", "swap", "additive"):
        return PacaConfig(r=RANK, paca_alpha=RANK, target_modules=targets, random_seed=seed)
    rank = 4 if method == "lora_r4" else RANK
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=targets,
        lora_dropout=0.1 if method == "lora_dropout" else 0.0,
        use_dora=method == "dora",
    )


def _make_additive(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, PacaLayer):
            layer.forward = _additive_forward(layer)


def _additive_forward(layer: Any) -> Callable[[Tensor], Tensor]:
    names = layer.active_adapters
    return lambda x: layer._additive_forward(x, names)
