"""The columns of a configuration: those that it gives, and those that its strategy chooses.

`PacaConfig.columns` holds the columns of an adapter that did not choose them at random, so that
whoever has the configuration has them too: TRL makes reference adapters from a configuration, and
copies parameters only.
"""

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from pacatune.format.options import target_of
from pacatune.format.tensors import PEFT_PREFIX
from pacatune.strategies import (
    FIXED,
    needs_of,
    random_columns,
    seed_for,
    select_columns,
    statistics_of,
)
from pacatune.tuner.compat import get_quantization_kwargs
from pacatune.tuner.config import PacaConfig, refuse_idle_layers, seeded
from pacatune.tuner.defaults import default_targets
from pacatune.tuner.given import given_to, key_of_columns
from pacatune.tuner.layer import PacaLayer
from pacatune.tuner.quantized import weight_matrix
from pacatune.tuner.rates import rates_by_input, rates_by_weight
from pacatune.tuner.targets import Target, check_targets, for_module

if TYPE_CHECKING:
    from pacatune.selection.statistics import ColumnStatistics

__all__ = [
    "choose_columns",
    "find_targets",
    "keep_columns",
    "other_columns",
    "settle_scaling",
]


def choose_columns(
    model: nn.Module, config: PacaConfig, statistics: "ColumnStatistics | None" = None
) -> PacaConfig:
    """Choose the columns of an adapter before it is made.

    Args:
        model: The base, with or without other adapters; not changed.
        config: The adapter's configuration. Columns that it gives already stay.
        statistics: What its `selection` and `normalize` need, see
            `pacatune.selection.collect_statistics`.

    Returns:
        A copy of `config` with the columns of every target in `columns`, and their rates in
        `column_rates` where steps are to be normalised.

    Raises:
        ValueError: If statistics are missing, columns do not fit their weight or name no target,
            or as `targets.check_targets` says.
        TypeError: As `targets.check_targets` says.
    """
    targets = find_targets(model, config)
    given = _matched(config.columns or {}, targets, config)
    if config.selection == FIXED and len(given) < len(targets):
        missing = sorted(targets.keys() - given.keys())
        raise ValueError(
            f"`columns` gives none for {len(missing)} adapted modules, first {missing[0]!r}; name "
            "them too, or take them out of `target_modules`."
        )
    if len(given) < len(targets):
        config = seeded(config)
        if "weight" in needs_of(str(config.selection)):
            _refuse_merged(model)
    rates = _rates(model, config, targets, statistics)
    chosen = {
        name: given[name] if name in given else _choose(name, target, config, statistics, model)
        for name, target in targets.items()
    }
    config = copy.copy(config)
    config.columns = chosen
    if rates is not None:
        config.column_rates = {name: _rates_at(rates[name], chosen[name]) for name in targets}
    if statistics is not None and config.selection_options is None:
        config.selection_options = {"num_batches": statistics.num_batches}
    return config


def find_targets(model: nn.Module, config: PacaConfig) -> dict[str, Target]:
    """Return what a configuration adapts, by the names that files know."""
    kwargs = get_quantization_kwargs(model)
    if config.target_modules is None:
        config = copy.copy(config)
        try:
            config.target_modules = default_targets(model, **kwargs)  # type: ignore[assignment]
            refuse_idle_layers(config)
        except ValueError:
            if not config.target_parameters:
                raise
    return check_targets(BaseTuner, config, model, **kwargs)


def _matched(
    columns: Mapping[str, Any], targets: Mapping[str, Target], config: PacaConfig
) -> dict[str, Any]:
    keys = {name: key_of_columns(columns, name) for name in targets} if columns else {}
    unused = sorted(set(columns) - set(keys.values()))
    if unused:
        raise ValueError(
            f"`columns`: {unused[:5]} match nothing that is adapted; `target_modules` "
            f"({config.target_modules}) decides what is."
        )
    given = {name: columns[key] for name, key in keys.items() if key is not None}
    for name, indices in given.items():
        rank, num_columns = targets[name].rank, targets[name].num_columns
        for own in indices if config.groups > 1 else [indices]:
            if len(own) != rank:
                raise ValueError(
                    f"`columns` gives {len(own)} columns for {name!r}, whose rank is {rank}; set "
                    "`r` or `rank_pattern` to the number of columns."
                )
            if own[-1] >= num_columns:
                raise ValueError(
                    f"`columns` gives column {own[-1]} for {name!r}, which has {num_columns}; "
                    "the first one is 0."
                )
    return given


def _choose(
    name: str,
    target: Target,
    config: PacaConfig,
    statistics: "ColumnStatistics | None",
    model: nn.Module,
) -> Any:
    if config.groups > 1:
        options = config.random_seed, name, config.groups
        return random_columns(target.num_columns, target.rank, *options).tolist()
    needs, kinds = needs_of(str(config.selection)), statistics_of(str(config.selection))
    values = _collected(statistics if kinds else None, name, target)
    weight = next(iter(target.module.parameters())).new_empty(1, target.num_columns, device="meta")
    if "weight" in needs:
        kwargs = get_quantization_kwargs(model)
        weight = weight_matrix(target.module, target.parameter_name, **kwargs)
    seed = seed_for(config.random_seed, name)
    try:
        indices = select_columns(
            str(config.selection), weight, target.rank, seed=seed, statistics=values
        )
    except ValueError as error:
        raise ValueError(f"module {name!r}: {error}") from None
    return [int(index) for index in indices]


def _collected(
    statistics: "ColumnStatistics | None", name: str, target: Target
) -> Mapping[str, Tensor]:
    """Return what was collected about a target's columns, by kind."""
    values = {} if statistics is None else statistics.of(name)
    for kind, one in values.items():
        if one.shape[-1] != target.num_columns:
            raise ValueError(
                f"`statistics` has {one.shape[-1]} columns for {name!r} ({kind}), which has "
                f"{target.num_columns}; it is of another model."
            )
    return values


def _rates(
    model: nn.Module,
    config: PacaConfig,
    targets: Mapping[str, Target],
    statistics: "ColumnStatistics | None",
) -> dict[str, Tensor] | None:
    """Return the rates of all columns of each target; None where they are given, or all alike."""
    if config.column_rates is not None:
        _check_rates(config.column_rates, targets)
    if config.column_rates is not None or config.normalize == "none":
        return None
    if config.normalize == "weight":
        _refuse_merged(model)
        return {name: _rates_of_weight(model, name, target) for name, target in targets.items()}
    squares = {
        name: _collected(statistics, name, target).get("activation")
        for name, target in targets.items()
    }
    missing = sorted(name for name, one in squares.items() if one is None)
    if missing:
        raise ValueError(
            f"`normalize` ('input') needs statistics of the kind activation, and there are none of "
            f"{missing[0]!r}: collect them with pacatune.selection.collect_statistics and choose "
            "with choose_columns, before the adapter is made; `normalize` ('weight') needs none."
        )
    return {name: rates_by_input(one) for name, one in squares.items() if one is not None}


def _rates_of_weight(model: nn.Module, name: str, target: Target) -> Tensor:
    weight = getattr(target.module, target.parameter_name)
    if weight.is_meta:
        raise ValueError(
            f"`normalize` ('weight') looks at the weights, and that of {name!r} is on the meta "
            "device: load it first."
        )
    kwargs = get_quantization_kwargs(model)
    return rates_by_weight(weight_matrix(target.module, target.parameter_name, **kwargs))


def _rates_at(rates: Tensor, columns: list[Any]) -> list[Any]:
    """Return the rates of some columns, four digits each."""
    if isinstance(columns[0], list):
        return [_rates_at(rates, group) for group in columns]
    return [float(f"{rate:.4g}") for rate in rates[columns].tolist()]


def _check_rates(given: Mapping[str, list[Any]], targets: Mapping[str, Target]) -> None:
    for name, target in targets.items():
        rates = given_to(given, name)
        if rates is None:
            raise ValueError(
                f"`column_rates` has none of {name!r}, which is adapted; drop all of them, and "
                "they are found anew."
            )
        num_rates = len(rates[0]) if isinstance(rates[0], list | tuple) else len(rates)
        if num_rates != target.rank:
            raise ValueError(
                f"`column_rates` has {num_rates} rates for {name!r}, whose rank is {target.rank}; "
                "drop all of them, and they are found anew."
            )


def settle_scaling(model: nn.Module, config: PacaConfig) -> PacaConfig:
    """Say alpha / sqrt(r) as alpha / r, which every reader of the file knows.

    Returns:
        A copy of `config` whose alphas are multiplied by sqrt(r); itself without `use_rslora`.
    """
    if not config.use_rslora:
        return config
    config = copy.copy(config)
    alphas = {}
    for name, target in find_targets(model, config).items():
        module = target_of(name)
        alpha = for_module(config.alpha_pattern, module, config.paca_alpha)
        alphas[module] = alpha * math.sqrt(target.rank)
    config.paca_alpha = config.paca_alpha * math.sqrt(config.r)
    config.alpha_pattern = {n: one for n, one in alphas.items() if one != config.paca_alpha}
    config.use_rslora = False
    return config


def _refuse_merged(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, PacaLayer) and layer.merged_adapters:
            raise ValueError(
                f"adapters {layer.merged_adapters} are merged into the weights, from which columns "
                "are to be chosen, or their rates; unmerge them first."
            )


def keep_columns(config: PacaConfig, columns: Mapping[str, Tensor]) -> None:
    """Let a configuration say which columns an adapter has, where it would say others.

    It is changed in place; its seed, which has not chosen these, is taken out.
    """
    if columns:
        listed = {name: indices.tolist() for name, indices in columns.items()}
        config.columns = {**(config.columns or {}), **listed}  # type: ignore[assignment]
        config.random_seed = None


def other_columns(
    model: Any, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the columns of a file, if they are not those which its configuration leads to."""
    columns_of, differ = {}, False
    for name, module in model.named_modules():
        if isinstance(module, PacaLayer) and adapter_name in module.r:
            columns = state_dict.get(f"{name}.paca_indices.{adapter_name}")
            current = module.paca_indices[adapter_name]
            if columns is None or columns.is_meta or current.is_meta:
                continue
            columns_of[name.removeprefix(PEFT_PREFIX)] = columns
            differ |= not torch.equal(columns.cpu(), current.cpu())
    return columns_of if differ else {}
