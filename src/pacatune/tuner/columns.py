"""The columns of a configuration: those that it gives, and those that its strategy chooses.

`PacaConfig.columns` holds the columns of an adapter that did not choose them at random, so that
whoever has the configuration has them too: TRL makes reference adapters from a configuration, and
copies parameters only.
"""

import copy
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from pacatune.format.options import IN_TENSORS
from pacatune.format.patterns import matching_key
from pacatune.format.tensors import INDICES, PEFT_PREFIX
from pacatune.strategies import FIXED, needs_of, seed_for, select_columns
from pacatune.tuner.compat import get_quantization_kwargs
from pacatune.tuner.config import PacaConfig, key_of_columns, seeded
from pacatune.tuner.defaults import log_once, settle_targets
from pacatune.tuner.layer import PacaLayer
from pacatune.tuner.quantized import weight_matrix
from pacatune.tuner.targets import Target, check_targets, for_module

if TYPE_CHECKING:
    from pacatune.selection.statistics import ColumnStatistics

NOT_LOADED = (
    "the columns of this configuration are in the tensors of the folder that it is from: load the "
    "adapter with PeftModel.from_pretrained or `load_adapter`, or make a new one of the same "
    "columns with PacaConfig(selection=pacatune.selection.load_columns(FOLDER))."
)


def choose_columns(
    model: nn.Module, config: PacaConfig, statistics: "ColumnStatistics | None" = None
) -> PacaConfig:
    """Choose the columns of an adapter before it is made.

    Args:
        model: The base, with or without other adapters; not changed.
        config: The adapter's configuration. Columns that it gives already stay.
        statistics: What its `selection` needs, see `pacatune.selection.collect_statistics`.

    Returns:
        A copy of `config` with the columns of every target in `columns`.

    Raises:
        ValueError: If statistics are missing, columns do not fit their weight or name no target,
            or as `targets.check_targets` says.
        TypeError: As `targets.check_targets` says.
    """
    targets = find_targets(model, config)
    if isinstance(config.columns, str):
        raise ValueError(NOT_LOADED)
    given = _matched(config.columns or {}, targets, config)
    if config.selection == FIXED and len(given) < len(targets):
        missing = sorted(targets.keys() - given.keys())
        raise ValueError(
            f"`columns` gives none for {len(missing)} adapted modules, first {missing[0]!r}; name "
            "them too, or take them out of `target_modules`."
        )
    if len(given) < len(targets):
        if "weight" in needs_of(str(config.selection)):
            _refuse_merged(model)
        config = seeded(config)
    columns: dict[str, Any] = {}
    for name, target in targets.items():
        try:
            columns[name] = given.get(name) or _choose(model, config, name, target, statistics)
        except ValueError as error:
            raise ValueError(f"module {name!r}: {error}") from None
    config = copy.copy(config)
    config.columns = columns
    if statistics is not None and config.selection_options is None:
        config.selection_options = {"num_batches": statistics.num_batches}
    return config


def _choose(
    model: nn.Module,
    config: PacaConfig,
    name: str,
    target: Target,
    statistics: "ColumnStatistics | None",
) -> Any:
    selection, seed = str(config.selection), seed_for(config.random_seed, name)
    needs = needs_of(selection)
    weight = torch.empty(1, target.num_columns, device="meta")  # a shape alone, if it is not needed
    if "weight" in needs:
        kwargs = get_quantization_kwargs(model)
        weight = weight_matrix(target.module, target.parameter_name, **kwargs)
    is_read = statistics is not None and set(needs) - {"weight"}
    values = statistics.of(name) if statistics is not None and is_read else {}
    for kind, scores in values.items():
        if len(scores) != target.num_columns:
            raise ValueError(
                f"`statistics` has {len(scores)} columns ({kind}) and the weight "
                f"{target.num_columns}; it is of another model."
            )
    number = target.num_trained
    return select_columns(selection, weight, number, seed=seed, statistics=values).tolist()


def find_targets(model: nn.Module, config: PacaConfig) -> dict[str, Target]:
    """Return what a configuration adapts, by the names that files know."""
    kwargs = get_quantization_kwargs(model)
    config = copy.copy(config)
    settle_targets(config, model, **kwargs)
    return check_targets(BaseTuner, config, model, **kwargs)


def fit_ranks(model: nn.Module, config: PacaConfig) -> None:
    """Let a weight with fewer columns than its rank train all, by `rank_pattern`, and say so."""
    probe, asked = copy.copy(config), config.rank_pattern or {}
    probe.r, probe.rank_pattern = 1, {}
    sizes = {name: target.num_columns for name, target in find_targets(model, probe).items()}
    narrow = {
        name: size for name, size in sizes.items() if size < for_module(asked, name, config.r)
    }
    if narrow:
        name, size = next(iter(narrow.items()))
        log_once(
            f"{len(narrow)} weights have fewer columns than their rank and train all of them, "
            f"first {name!r} ({size})."
        )
        # The first pattern that fits counts; without ^, a name fits the ends of longer ones.
        fitted = {f"^{re.escape(name)}": size for name, size in narrow.items()}
        deciding = {name: matching_key(asked, name) for name in sizes}
        idle = {deciding[n] for n in narrow} - {deciding[n] for n in sizes if n not in narrow}
        kept = {pattern: rank for pattern, rank in asked.items() if pattern not in idle}
        config.rank_pattern = {**fitted, **kept}


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
        num_trained, num_columns = targets[name].num_trained, targets[name].num_columns
        if len(indices) != num_trained:
            sizes = "`r` or `rank_pattern`" if config.channels is None else "`channels`"
            raise ValueError(
                f"`columns` gives {len(indices)} columns for {name!r}, of which {num_trained} are "
                f"trained; set {sizes} to the number of columns."
            )
        if indices[-1] >= num_columns:
            raise ValueError(
                f"`columns` gives column {indices[-1]} for {name!r}, which has {num_columns}; "
                "the first one is 0."
            )
    return given


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
        alpha = for_module(config.alpha_pattern, name, config.paca_alpha)
        alphas[name] = alpha * math.sqrt(target.rank)
    config.paca_alpha = config.paca_alpha * math.sqrt(config.r)
    config.alpha_pattern = {n: one for n, one in alphas.items() if one != config.paca_alpha}
    config.use_rslora = False
    return config


def _refuse_merged(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, PacaLayer) and layer.merged_adapters:
            raise ValueError(
                f"adapters {layer.merged_adapters} are merged into the weights, from which columns "
                "are to be chosen; unmerge them first."
            )


def keep_columns(config: PacaConfig, columns: Mapping[str, Tensor]) -> None:
    """Let a configuration say which columns an adapter has, where it would say others.

    It is changed in place; its seed, which has not chosen these, is taken out.
    """
    if columns:
        listed = {name: own.tolist() for name, own in columns.items()}
        others: Any = config.columns if isinstance(config.columns, dict) else {}
        config.columns = {**others, **listed}
        config.random_seed = None


def note_columns(
    config: PacaConfig, model: Any, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> None:
    """Let a configuration say the columns of a file, if they are not those which it leads to."""
    found, differ = {}, False
    for name, module in model.named_modules():
        if isinstance(module, PacaLayer) and adapter_name in module.r:
            indices = state_dict.get(f"{name}.{INDICES}.{adapter_name}")
            current = module.paca_indices[adapter_name]
            if indices is None or indices.is_meta or current.is_meta:
                continue
            found[name.removeprefix(PEFT_PREFIX)] = indices
            differ |= not torch.equal(indices.cpu(), current.cpu())
    if config.columns == IN_TENSORS:
        config.columns = {name: columns.tolist() for name, columns in found.items()}
    elif differ:
        keep_columns(config, found)
