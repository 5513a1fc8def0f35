"""What each method makes of a model: all adapters are PEFT's, of one rank, on the same layers."""

from collections.abc import Collection, Sequence

import torch
from torch import nn

from pacatune.methods import Method, adapter_config, size_options


def add_adapter(
    model: nn.Module,
    row: Method,
    *,
    rank: int,
    alpha: int | None = None,
    channels: int | float | None = None,
    dropout: float = 0.0,
    targets: Collection[str] | str = (),
    heads: Sequence[str] = (),
    seed: int | None = None,
) -> nn.Module:
    """Put the adapter of a method on a model, in the dtype that PEFT gives it.

    Without `targets` it adapts the linear layers of the blocks; the modules named `heads` are
    trained in full. `channels` are PaCA's.
    """
    from pacatune.tuner.columns import fit_ranks
    from pacatune.tuner.defaults import default_targets
    from pacatune.tuner.ignored import put_adapter

    options = size_options(row, rank, alpha or rank, dropout)
    if seed is not None:
        torch.manual_seed(seed)
        if row.is_paca:
            options["random_seed"] = seed
    if row.is_paca:
        options["channels"] = channels
    if not isinstance(targets, str):
        targets = list(targets) or default_targets(model)
    config = adapter_config(
        row, **options, target_modules=targets, modules_to_save=list(heads) or None
    )
    if row.is_paca:
        fit_ranks(model, config)
    return put_adapter(model, config)
