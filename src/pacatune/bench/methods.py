"""The methods that are compared: what each makes of a model, and what it trains.

Every adapter is made by PEFT, with the same rank, alpha (= rank, so that the factor is 1) and
layers; every method that trains has torch's AdamW over its trainable parameters only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn

from pacatune import methods as table
from pacatune.installation import install_command
from pacatune.names import choose

__all__ = ["METHODS", "Contender", "adapt", "check_methods", "is_ours", "quantization_of"]

_FORMS = {
    "paca-resident": "PaCA, columns always written into the weight",
    "paca-transient": "PaCA, weight never written: one thin product more per layer",
    "paca-lean": "PaCA, with lean activations",
}
METHODS = {
    "frozen": "forward and input gradients of the frozen model: no adapter, no optimizer",
    **{name: table.METHODS[name].summary for name in table.TEXT_METHODS},
    **_FORMS,
}
"""Name -> description: the methods for language models, and what only a measurement has."""

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
    row = _row(method)
    return row is not None and row.is_paca


def quantization_of(method: str) -> str | None:
    """Return how the base of a method is quantised."""
    row = _row(method)
    return None if row is None else row.quantization


def _row(method: str) -> table.Method | None:
    return table.METHODS.get("paca" if method in _FORMS else method)


def check_methods(methods: Sequence[str], *, compiled: bool) -> tuple[str, ...]:
    """Return names as `METHODS` has them; refuse those that cannot be measured here.

    Args:
        methods: Names.
        compiled: Whether models are compiled.

    Raises:
        ValueError: If there is none, one is unknown or named twice, cannot be compiled, or needs a
            package that is not installed.
    """
    if not methods:
        raise ValueError(f"`methods` is empty; choose from {', '.join(METHODS)}.")
    chosen = [choose(method, METHODS, option="methods") for method in methods]
    for method in chosen:
        if chosen.count(method) > 1:
            raise ValueError(f"method {method!r} is named twice; name it once.")
        if compiled and method in _EAGER_ONLY:
            raise ValueError(
                f"method {method!r} with compiled models: a compiled graph decides by itself how "
                "PaCA runs; choose paca."
            )
        if quantization_of(method) is not None and find_spec("bitsandbytes") is None:
            raise ValueError(
                f"method {method!r} needs bitsandbytes; {install_command('quant')}, or leave it "
                "out."
            )
    return tuple(chosen)


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
        dropout: Of `lora_dropout`.
        seed: Of PaCA's columns and LoRA's start.
        adapter_dtype: Of what an adapter trains.
    """
    model.requires_grad_(method == "full")
    row = _row(method)
    if row is not None and row.has_adapter:
        from peft import get_peft_model

        from pacatune.tuner.defaults import default_targets

        torch.manual_seed(seed)
        options = table.size_options(row, rank, rank, dropout if row.dropout is not None else 0.0)
        if row.is_paca:
            options["random_seed"] = seed
        config = table.adapter_config(row, **options, target_modules=default_targets(model))
        model = cast(nn.Module, get_peft_model(cast(Any, model), config))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(adapter_dtype)
    if method in ("paca-resident", "paca-transient"):
        _fix_form(model, is_resident=method == "paca-resident")
    if method == "paca-lean":
        from pacatune import lean

        lean.enable(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Contender(method, model.train(), _make_optimizer(trained))


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
