"""The methods that are compared: what each makes of a model, and what it trains.

Every adapter is made by PEFT, with the same rank, alpha (= rank, so that the factor is 1) and
layers; every method that trains has torch's AdamW over its trainable parameters only.
"""

import difflib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from pacatune.installation import install_command

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["METHODS", "Contender", "adapt", "check_methods", "is_ours"]

METHODS = {
    "frozen": "forward and input gradients of the frozen model: no adapter, no optimizer",
    "full": "every weight trained",
    "lora": "PEFT's LoRA, no dropout",
    "lora-dropout": "PEFT's LoRA with dropout",
    "dora": "PEFT's DoRA",
    "moslora": "LoRA with a trained mixer",
    "paca": "ours, as it runs",
    "paca-resident": "ours, columns always written into the weight",
    "paca-transient": "ours, weight never written: one thin product more per layer",
    "paca-lean": "ours, with lean activations",
    "qlora": "PEFT's LoRA on a base of 4 bits (nf4)",
    "qpaca": "ours on a base of 4 bits (nf4)",
}
QUANTIZED = ("qlora", "qpaca")
_LEARNING_RATE = 1e-4
# Compiled graphs decide by themselves how to run.
_EAGER_ONLY = ("paca-resident", "paca-transient")


@dataclass(frozen=True)
class Contender:
    """A model ready to be trained by one method."""

    method: str
    model: nn.Module
    optimizer: torch.optim.Optimizer | None

    @property
    def num_trainable_parameters(self) -> int:
        """Number of trained values."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def is_ours(method: str) -> bool:
    """Whether a method is PaCA in one of its forms."""
    return method.removeprefix("q").startswith("paca")


def check_methods(methods: Sequence[str], *, compiled: bool) -> None:
    """Refuse methods that cannot be measured here, before any model is built.

    Args:
        methods: Names.
        compiled: Whether models are compiled.

    Raises:
        ValueError: If there is none, one is unknown or named twice, cannot be compiled, or needs a
            package that is not installed.
    """
    if not methods:
        raise ValueError(f"`methods` is empty; choose from {', '.join(METHODS)}.")
    for method in methods:
        if method not in METHODS:
            nearest = difflib.get_close_matches(method, METHODS, n=1)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise ValueError(f"unknown method {method!r}; {hint}Choose from {', '.join(METHODS)}.")
        if methods.count(method) > 1:
            raise ValueError(f"method {method!r} is named twice; name it once.")
        if compiled and method in _EAGER_ONLY:
            raise ValueError(
                f"method {method!r} with compiled models: a compiled graph decides by itself how "
                "PaCA runs; choose paca."
            )
        _check_installed(method)


def _check_installed(method: str) -> None:
    if method in QUANTIZED and find_spec("bitsandbytes") is None:
        raise ValueError(
            f"method {method!r} needs bitsandbytes; {install_command('quant')}, or leave it out."
        )
    if method == "paca-lean" and _find("pacatune.lean", "enable") is None:
        raise ValueError(
            f"method {method!r}: this version of pacatune has no lean activations; leave it out."
        )
    if method == "moslora" and _find("pacatune", "MosLoraConfig") is None:
        raise ValueError(f"method {method!r}: this version of pacatune has none; leave it out.")


def _find(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None


def adapt(
    model: nn.Module,
    method: str,
    *,
    rank: int,
    dropout: float,
    seed: int,
    adapter_dtype: torch.dtype,
) -> Contender:
    """Make `model` a contender, in training mode.

    Args:
        model: Untouched, on its device; adapted in place.
        method: One of `METHODS`.
        rank: Of every adapter.
        dropout: Of `lora-dropout`.
        seed: Of PaCA's columns and LoRA's start.
        adapter_dtype: Of what an adapter trains.
    """
    model.requires_grad_(method == "full")
    if method not in ("frozen", "full"):
        from peft import get_peft_model

        torch.manual_seed(seed)
        config = _adapter_config(model, method, rank, dropout, seed)
        model = cast(nn.Module, get_peft_model(cast(Any, model), config))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(adapter_dtype)
    if method in ("paca-resident", "paca-transient"):
        _fix_form(model, is_resident=method == "paca-resident")
    if method == "paca-lean":
        _find("pacatune.lean", "enable")(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Contender(method, model.train(), _make_optimizer(trained))


def _adapter_config(
    model: nn.Module, method: str, rank: int, dropout: float, seed: int
) -> "PeftConfig":
    from pacatune.tuner.defaults import default_targets

    options: dict[str, Any] = {"r": rank, "target_modules": default_targets(model)}
    if is_ours(method):
        from pacatune import PacaConfig

        return PacaConfig(**options, paca_alpha=rank, random_seed=seed)
    from peft import LoraConfig

    kind = _find("pacatune", "MosLoraConfig") if method == "moslora" else LoraConfig
    if method == "lora-dropout":
        options["lora_dropout"] = dropout
    if method == "dora":
        options["use_dora"] = True
    return cast("PeftConfig", kind(**options, lora_alpha=rank))


def _make_optimizer(trained: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    if not trained:
        return None
    try:
        return torch.optim.AdamW(trained, lr=_LEARNING_RATE, fused=True)
    except RuntimeError:  # torch says so where the device has no fused one
        return torch.optim.AdamW(trained, lr=_LEARNING_RATE)


def _fix_form(model: nn.Module, *, is_resident: bool) -> None:
    from pacatune.tuner.linear import Linear

    for layer in model.modules():
        if isinstance(layer, Linear):
            make_forward = _resident_forward if is_resident else _transient_forward
            cast(Any, layer).forward = make_forward(layer)


def _resident_forward(layer: Any) -> Callable[[Tensor], Tensor]:
    from pacatune.ops.linear import apply_paca_linear, autocast
    from pacatune.residency import Pass

    def forward(x: Tensor) -> Tensor:
        residency, update = layer.residency, layer._single_update()
        bias, source = dict.get(residency.parameters, "bias"), Pass(residency, *update)

        def apply(weight: Tensor, is_resident: bool) -> Tensor:
            if not is_resident:
                raise RuntimeError(
                    "method 'paca-resident': somebody holds the weight of a layer, so its columns "
                    "cannot be written; measure paca instead."
                )
            y: Tensor = apply_paca_linear(autocast(x), weight, *update, bias, True, source)
            return y

        y = source.forward(apply)
        assert y is not None
        return y

    return forward


def _transient_forward(layer: Any) -> Callable[[Tensor], Tensor]:
    from pacatune.ops.linear import apply_paca_linear, autocast

    def forward(x: Tensor) -> Tensor:
        residency, update = layer.residency, layer._single_update()
        weight, bias = residency.find_weight(), dict.get(residency.parameters, "bias")
        y: Tensor = apply_paca_linear(autocast(x), weight, *update, bias, False)
        return y

    return forward
