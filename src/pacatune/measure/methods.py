"""What each method makes of a model that is measured or simulated, and what it trains.

Every adapter is made by PEFT, with the same rank, alpha (= rank unless given) and layers; every
method that trains has torch's AdamW over its trainable parameters only.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pacatune.measure.setting import row_of
from pacatune.methods import Method, adapter_config, size_options

_LEARNING_RATE = 1e-4


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


def add_adapter(
    model: nn.Module,
    row: Method,
    *,
    rank: int,
    alpha: int | None = None,
    dropout: float = 0.0,
    targets: Collection[str] | str = (),
    heads: Sequence[str] = (),
    seed: int | None = None,
    groups: int = 1,
    is_meta: bool = False,
) -> nn.Module:
    """Put the adapter of a method on a model, in the dtype that PEFT gives it.

    Without `targets` it adapts the linear layers of the blocks; the modules named `heads` are
    trained in full; `groups` are PaCA's row groups; `is_meta` tells that the model has no weights.
    """
    from peft import get_peft_model

    from pacatune.tuner.defaults import default_targets

    options = size_options(row, rank, alpha or rank, dropout)
    if row.is_paca:
        options["groups"] = groups
    if seed is not None:
        torch.manual_seed(seed)
        if row.is_paca:
            options["random_seed"] = seed
    if not isinstance(targets, str):
        targets = list(targets) or default_targets(model)
    config = adapter_config(
        row, **options, target_modules=targets, modules_to_save=list(heads) or None
    )
    adapted: Any = get_peft_model(cast(Any, model), config, low_cpu_mem_usage=is_meta)
    return cast(nn.Module, adapted)


def adapt(
    model: nn.Module,
    method: str,
    *,
    rank: int,
    dropout: float,
    seed: int,
    alpha: int | None = None,
    adapter_dtype: torch.dtype | None = None,
    targets: Collection[str] | str = (),
    heads: Sequence[str] = (),
    groups: int = 1,
) -> Contender:
    """Make a model on its device a contender, in place and in training mode.

    `method` is one of `setting.METHODS`, or `head` where there are heads, which every method but
    `frozen` trains in full; `adapter_dtype` is that of what is trained, PEFT's choice if None.
    """
    model.requires_grad_(method == "full")
    row = row_of(method)
    if row is not None and row.has_adapter:
        dropout = dropout if row.dropout is not None else 0.0
        model = add_adapter(
            model,
            row,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            targets=targets,
            heads=heads,
            seed=seed,
            groups=groups,
        )
        for parameter in model.parameters() if adapter_dtype is not None else ():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(adapter_dtype)
    elif row is not None:
        for name in heads:
            model.get_submodule(name).requires_grad_()
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
    """Let every layer of PaCA always, or never, write its columns into the weight."""
    from pacatune.tuner.linear import Linear

    make_forward = _resident_forward if is_resident else _transient_forward
    for layer in model.modules():
        if isinstance(layer, Linear):
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
