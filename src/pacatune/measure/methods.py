"""What each method makes of a model that is measured or simulated, and what it trains.

Every adapter is made by PEFT, with the same rank, alpha (= rank unless given) and layers; every
method that trains has torch's AdamW over its trainable parameters only.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from pacatune import lean, methods
from pacatune.measure.setting import METHODS
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
) -> nn.Module:
    """Put the adapter of a method on a model, in the dtype that PEFT gives it.

    Without `targets` it adapts the linear layers of the blocks; the modules named `heads` are
    trained in full.
    """
    from pacatune.tuner.columns import fit_ranks
    from pacatune.tuner.defaults import default_targets
    from pacatune.tuner.ignored import put_adapter

    options = size_options(row, rank, alpha or rank, dropout)
    if seed is not None:
        torch.manual_seed(seed)
        if row.is_paca:
            options["random_seed"] = seed
    if not isinstance(targets, str):
        targets = list(targets) or default_targets(model)
    config = adapter_config(
        row, **options, target_modules=targets, modules_to_save=list(heads) or None
    )
    if row.is_paca:
        fit_ranks(model, config)
    return put_adapter(model, config)


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

    This is the one way in which measurements adapt a model; `step.Step` times what it returns. A
    form that is no method, such as columns swapped around every product, changes the layers of
    `contender.model` afterwards.

    Args:
        model: With its weights.
        method: One of `setting.METHODS`, or `head` where there are heads.
        rank: Of every adapter.
        dropout: Of methods that have one.
        seed: Of the adapter's random values.
        alpha: The rank if None.
        adapter_dtype: Of what is trained; PEFT's choice if None.
        targets: Names of modules to adapt, or `all-linear`; by default the linear layers of the
            blocks.
        heads: Modules that every method but `frozen` trains in full.
    """
    model.requires_grad_(method == "full")
    row = (methods.METHODS | METHODS)[method]
    if row.has_adapter:
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
    elif method != "frozen":
        for name in heads:
            model.get_submodule(name).requires_grad_()
    if change := _FORMS.get(method):
        change(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Contender(method, model.train(), _make_optimizer(trained))


def _make_optimizer(trained: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    if not trained:
        return None
    try:
        return torch.optim.AdamW(trained, lr=_LEARNING_RATE, fused=True)
    except RuntimeError:  # torch says so where the device has no fused one
        return torch.optim.AdamW(trained, lr=_LEARNING_RATE)


def _never_write(model: nn.Module) -> None:
    from pacatune.tuner.linear import Linear

    for layer in model.modules():
        if isinstance(layer, Linear):
            cast(Any, layer.residency).forbidden = "it is measured without"


_FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "paca-transient": _never_write,
    "paca-lean": lean.enable,
}
